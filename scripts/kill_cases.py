"""The runs that scripts/kill_campaign kills, and the moments: drawn, always the same for a seed."""

import random
import signal
from dataclasses import dataclass

METHODS = ("moco", "dino", "swav", "simsiam", "deepcluster_v2", "msn")
STEPS, SAVED_EVERY, EPOCH = 15, 2, 5


@dataclass(frozen=True)
class Kill:
    """moment: starting, training, saving, evaluating or closing, at a step, and seconds later. then: a second signal, or None."""

    moment: str
    step: int
    delay: float
    target: str  # command, group, process, worker or all
    number: signal.Signals
    then: tuple[signal.Signals, float] | None

    def __str__(self) -> str:
        second = f" and {self.then[0].name} {self.then[1] * 1000:.0f} ms later" if self.then else ""
        return f"{self.number.name}{second} to {self.target}, {self.moment} (step {self.step}) + {self.delay * 1000:.0f} ms"


@dataclass(frozen=True)
class Case:
    method: str
    processes: int
    workers: int | None  # None: the digits, in memory; else images in files, decoded by so many
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        data = "digits" if self.workers is None else f"files, {self.workers} workers"
        return f"{self.method}, processes={self.processes}, {data}"


def drawn_cases(seed: int, kills: int) -> list[Case]:
    """Runs with so many kills together, always the same for a seed."""
    draw, cases = random.Random(seed), []
    while (left := kills - sum(len(case.kills) for case in cases)) > 0:
        processes, workers = draw.choice((1, 1, 2)), draw.choice((None, None, 0, 2))
        count = min(left, draw.choice((1, 2, 2, 3)))
        kills_here = tuple(_drawn_kill(draw, processes, workers) for _ in range(count))
        cases.append(Case(draw.choice(METHODS), processes, workers, kills_here))
    return cases


def _drawn_kill(draw: random.Random, processes: int, workers: int | None) -> Kill:
    moment = draw.choice(("starting", "training", "saving", "evaluating", "closing"))
    longest = {"starting": 0.6, "training": 0.02, "saving": 0.02, "evaluating": 0.05, "closing": 0.25}[moment]
    targets = ["command", "command", "group", "all"]
    targets += (["process"] if processes > 1 else []) + (["worker"] if workers and moment == "training" else [])
    number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    target = draw.choice(targets)
    second = None
    if number != signal.SIGKILL and draw.random() < 0.3:
        second = draw.choice((number, signal.SIGKILL)), draw.uniform(0, 0.1)
    if target == "worker":  # they leave other signals to their process
        number, second = signal.SIGKILL, None
    return Kill(moment, draw.randrange(1, STEPS), draw.uniform(0, longest), target, number, second)
