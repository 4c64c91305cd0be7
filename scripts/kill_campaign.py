"""Does a run that is killed come out as one that is not? Kills at drawn moments, then the same command: scripts/kill_campaign

    scripts/kill_campaign                          # 200 kills
    scripts/kill_campaign --kills 50 --seed 3      # others
    scripts/kill_campaign --seed 3 --only 17 -v    # one of these runs again
    scripts/kill_campaign --folder /dev/shm        # on another file system

A run of a method with state of its own, in one process or two, with or without loader workers, is cut short once, twice or three
times: by SIGKILL, SIGTERM, SIGINT or two of them, sent to the command, its group, one of its processes, a loader worker or all of
them, while it starts, trains, saves, evaluates or closes. After each kill: the status is the documented one, no process is left
after ten seconds, the lock is free, every checkpoint verifies. Then the same command is repeated until it ends, and what it
leaves is compared with the run that nothing disturbed: weights, optimizer and generators bit for bit, lines of metrics.jsonl,
TensorBoard's points, results, the names of all files, and that the temporary folder is empty. Status 1: a difference.

Runs are forked from a process that has imported everything, as the tests' are (tests/processes.py).
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "scripts")]

from kill_cases import EPOCH, SAVED_EVERY, STEPS, Case, Kill, drawn_cases  # noqa: E402
from kill_traces import compare, traces  # noqa: E402

from sslctl.runs import checkpoint, claim  # noqa: E402
from tests.methods import words_of  # noqa: E402
from tests.processes import Command, children_of, logged_steps, running, start  # noqa: E402
from tests.runs import MOCO, PROBE, command, image_folder  # noqa: E402

RUN = (
    *(f"trainer.epochs={STEPS // EPOCH}", f"trainer.save_every_steps={SAVED_EVERY}", "trainer.tensorboard=true"),
    *("evaluation.knn_every_epochs=1", "evaluation.closing=true", "trainer.timeout_minutes=1", *PROBE),
)
IMAGES = 28  # of the folder that workers read; about 22 are for training
OF_THE_DIGITS = tuple(f"dataset.scale.{name}" for name in ("tile", "code", "decoder", "paired"))
OF_FEW_IMAGES = {"moco": ("method.queue_size=20", "method.batchnorm_groups=2"), "swav": ("method.queue_size=20",)}
SECONDS = 10  # in which nothing of a killed run is left
LIMIT = 120  # seconds of one start
HANDLED = {signal.SIGTERM: 143, signal.SIGINT: 130}


# --- Doing it ---


class Undisturbed:
    """The runs that nothing disturbed, each made once: in one process or two, of files or of the digits."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.images = image_folder(folder / "images", IMAGES)
        self.of = functools.cache(self.of)

    def words(self, case: Case, folder: Path) -> list[str]:
        own = MOCO if case.method == "moco" else words_of(case.method)
        words = (*own, *RUN, f"trainer.processes={case.processes}")
        if case.workers is not None:
            words = tuple(word for word in words if not word.startswith(OF_THE_DIGITS))
            words += (
                "dataset=imagefolder",
                f"dataset.root={self.images}",
                "dataset.image_size=16",
                "trainer.batch_size=4",
            )
            words += (f"trainer.workers={case.workers}", "evaluation.knn.k=5", *OF_FEW_IMAGES.get(case.method, ()))
        return command(folder / "run", *words)

    def of(self, method: str, processes: int, files: bool) -> dict:
        case = Case(method, processes, 0 if files else None, ())
        folder = self.folder / f"undisturbed-{method}-{processes}-{files}"
        folder.mkdir()
        (folder / "tmp").mkdir()
        process = start(self.words(case, folder), folder, {"TMPDIR": str(folder / "tmp")})
        status = process.wait(timeout=LIMIT)
        assert status == 0, f"{case} ends with status {status}:\n{(folder / 'output').read_text()}"
        return traces(folder)


def processes_in(folder: Path) -> list[int]:
    """Those that run with a folder as their current one: a run's all do."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "cwd") == str(folder) and running(int(entry.name)):
                pids.append(int(entry.name))
    return pids


def steps_per_epoch(run: Path) -> int:
    """That of a run; before it has begun, a number beyond its steps."""
    with contextlib.suppress(OSError):
        return json.loads((run / "environment.json").read_text())["facts"]["steps_per_epoch"]
    return 1000


def has_come(kill: Kill, folder: Path, already_logged: int) -> bool:
    """Whether a kill's moment is there."""
    run, at = folder / "run", max(kill.step, already_logged + 1)
    if kill.moment == "training":
        return logged_steps(run) >= at
    if kill.moment == "saving":
        at += -at % SAVED_EVERY
        return any(os.path.lexists(run / "checkpoints" / name) for name in (f".step-{at}.writing", f"step-{at}"))
    if kill.moment == "evaluating":
        return logged_steps(run) >= at + -at % steps_per_epoch(run)
    if kill.moment == "starting":
        return (folder / "started").exists()
    return "  evaluating" in (folder / "output").read_text()


def send(kill: Kill, process: Command, number: signal.Signals, folder: Path) -> bool:
    """Sends a signal to a kill's target; returns whether there is one."""
    children = children_of(process.pid)
    targets = {
        "command": [process.pid],
        "group": [-process.pid],
        "process": children[-1:],
        "worker": children[-1:],
        "all": processes_in(folder),
    }[kill.target]
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(targets)


def expected_statuses(case: Case, kill: Kill) -> set[int]:
    """The statuses with which a command may end that a kill has reached; 0 where it came too late."""
    last = kill.then[0] if kill.then else kill.number
    statuses = {0}
    for number in (kill.number, last):
        if number == signal.SIGKILL:
            statuses |= {-9} if kill.target in ("command", "group") else {-9, 1}
        else:
            # Before Python has begun, and when all is done, the system answers: a shell shows the same number.
            statuses |= {HANDLED[number], -number if kill.moment in ("starting", "closing") else HANDLED[number]}
    if kill.target in ("process", "all") and (kill.moment in ("starting", "closing") or kill.then):
        statuses |= {1, -kill.number}
    if kill.moment == "training" and kill.number == last == signal.SIGKILL and kill.target != "worker":
        statuses.remove(0)  # a worker that has delivered all its batches is not missed
    return statuses


def strike(case: Case, kill: Kill, words: list[str], folder: Path) -> tuple[bool, list[str]]:
    """Starts a run and cuts it short; returns whether it was in time, and what is wrong afterwards."""
    logged = logged_steps(folder / "run")
    (folder / "output").write_text("")
    process = start(words, folder, {"TMPDIR": str(folder / "tmp")})
    deadline = time.monotonic() + LIMIT
    while not has_come(kill, folder, logged) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(kill.delay)
    in_time = process.poll() is None and send(kill, process, kill.number, folder)
    if in_time and kill.then:
        time.sleep(kill.then[1])
        send(kill, process, kill.then[0], folder)
    wrong = []
    try:
        status = process.wait(timeout=LIMIT)
    except AssertionError:
        wrong.append(f"still runs after {LIMIT} s")
        process.kill()
        status = process.wait()
    if status not in (expected_statuses(case, kill) if in_time else {0}):
        wrong.append(f"status {status}")
    deadline = time.monotonic() + SECONDS
    # A process that is just ending is not found any more and may hold the lock for another moment.
    while ((left := processes_in(folder)) or claim.is_held(folder / "run")) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        wrong.append(f"processes {left} are left")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    printed = (folder / "output").read_text()
    if "Traceback" in printed:
        wrong.append("a traceback")
    if claim.is_held(folder / "run"):
        wrong.append("the lock is held")
    for path in checkpoint.steps_on_disk(folder / "run"):
        try:
            checkpoint.verify(path)
        except checkpoint.CheckpointError as error:
            wrong.append(str(error))
    return in_time, [f"{line} after {kill}\n{printed}" if number == 0 else line for number, line in enumerate(wrong)]


def try_case(case: Case, undisturbed: Undisturbed, folder: Path) -> tuple[list[bool], list[str]]:
    """Does a case; returns of each kill whether it was in time, and what is wrong."""
    folder.mkdir()
    (folder / "tmp").mkdir()
    words, in_time, wrong = undisturbed.words(case, folder), [], []
    for kill in case.kills:
        reached, problems = strike(case, kill, words, folder)
        in_time.append(reached)
        wrong += problems
    process = start(words, folder, {"TMPDIR": str(folder / "tmp")})
    status = process.wait(timeout=LIMIT)
    if status:
        return in_time, [*wrong, f"the same command ends with status {status}:\n{(folder / 'output').read_text()}"]
    wrong += compare(traces(folder), undisturbed.of(case.method, case.processes, case.workers is not None))
    if not wrong:
        shutil.rmtree(folder)
    return in_time, wrong


def main(words: list[str]) -> int:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scripts/kill_campaign", description=__doc__, formatter_class=as_written)
    parser.add_argument("--kills", type=int, default=200, help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--only", type=int, nargs="+", help="runs by number")
    parser.add_argument("--folder", help="where the runs are (the temporary folder)")
    parser.add_argument("-v", "--verbose", action="store_true", help="name every kill")
    args = parser.parse_args(words)
    begin, counts, bad = time.monotonic(), Counter(), []
    cases = drawn_cases(args.seed, args.kills)
    print(f"seed {args.seed}: {args.kills} kills of {len(cases)} runs", flush=True)
    with tempfile.TemporaryDirectory(prefix="kill-campaign-", dir=args.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        undisturbed = Undisturbed(folder)
        for number, case in enumerate(cases):
            if args.only and number not in args.only:
                continue
            reached, wrong = try_case(case, undisturbed, folder / str(number))
            counts.update(
                "too late" if not it else f"{kill.number.name} {kill.moment}"
                for it, kill in zip(reached, case.kills, strict=True)
            )
            if wrong or args.verbose:
                print(
                    f"run {number}: {case}",
                    *(f"  {kill}" for kill in case.kills),
                    *(f"  WRONG: {line}" for line in wrong),
                    sep="\n",
                    flush=True,
                )
            bad += [number] if wrong else []
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    seconds = time.monotonic() - begin
    print(f"{counts.total()} kills, {counts['too late']} too late; {len(bad)} runs differ {bad or ''}; {seconds:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
