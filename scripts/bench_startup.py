"""CPU seconds until work begins: python scripts/bench_startup.py [--rounds N] [--against TREE]

All rows take turns in every round; the table holds medians, and the medians of their ratios to `import torch, torchvision`.

plan             until the plan is printed: what follows, timed steps, is work
pretraining      until the first step may begin: the run's directory, its lock and its checkpoints are dealt with
to its end       an epoch of 11 steps of a network of four features on one thread, its online figures, its files
process          one of trainer.processes=2, until the first step may begin
--help, a typo   of the verb, of a key

--against: another checkout of sslctl, whose rows stand beside.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OWN = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
RUN = (
    *("pretrain", "method=simclr", "backbone.widths=[4]", "trainer.epochs=1", "scheduler.warmup_epochs=0"),
    *("trainer.threads=1", "trainer.tensorboard=false", "evaluation.closing=false"),
)
STARTED = "starting at step 0"
ROWS = {  # name: (words, the line that ends the start; None: the whole)
    "plan": ((*RUN, "plan_only=true"), "run    "),
    "pretraining": (RUN, STARTED),
    "to its end": (RUN, None),
    "process": ((*RUN, "trainer.processes=2"), STARTED),
    "--help": (("--help",), None),
    "typo of the verb": (("pretran",), None),
    "typo of a key": (("pretrain", "optimizer.lrr=1"), None),
}


def seconds_of(process: int) -> float:
    """CPU seconds of a living process; where it has started others, of the first of them instead."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    fields = Path(f"/proc/{children[0] if children else process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # user, system


def measure(arguments: tuple[str, ...], tree: Path, end: str | None = None) -> float:
    """CPU seconds of a Python process until it prints a line with `end`, or to its own end."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        if end is None:
            process.stdout.read()
            usage = os.wait4(process.pid, 0)[2]
            process.returncode = 0
            return usage.ru_utime + usage.ru_stime
        if not any(end in line for line in process.stdout):
            errors.seek(0)
            raise RuntimeError(f"{arguments} ended before it printed {end!r}: {errors.read()}")
        seconds = seconds_of(process.pid)
        process.terminate()
        process.communicate()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    trees = [OWN, options.against.resolve()] if options.against else [OWN]
    bare, rows = [], {(name, tree): [] for name in ROWS for tree in trees}
    for _ in range(options.rounds):
        bare.append(measure(("-c", "import torch, torchvision"), OWN))
        for (name, tree), seconds in rows.items():
            words, end = ROWS[name]
            seconds.append(measure(("-m", "sslctl", *words), tree, end))
    print(f"{'import torch, torchvision':<26} {statistics.median(bare):.2f} s")
    for name in ROWS:
        cells = []
        for tree in trees:
            ratios = [a / b for a, b in zip(rows[name, tree], bare, strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            cells.append(f"{statistics.median(rows[name, tree]):6.2f} s {statistics.median(ratios):5.2f} ({spread})")
        print(f"{name:<26} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
