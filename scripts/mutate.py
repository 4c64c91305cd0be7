"""Do the tests notice a fault? One-line faults, each put into the code for one run of its tests: scripts/mutate [NAMES]

    scripts/mutate                                   # every list below scripts/mutations
    scripts/mutate moco losses                       # the lists of these names, or in these folders
    scripts/mutate --jobs 4 --verbose                # with the test that notices each

A list is a YAML file, of one document or several:

    file: sslctl/losses/contrastive.py
    tests: [tests/test_losses.py, -k, nt_xent]       # words for pytest: the fast tests of this part
    faults:
      - {old: "text that stands once in the file", new: "the same with a fault"}
      - {old: "…", new: "…", equivalent: why nothing can differ}

Nothing on disk changes: a process that has imported torch and the like is forked for each fault, and its child imports the
file with the fault in it (of a file below configs, it reads a copy of the folder). Processes that a test starts afresh do not
see it. The tests must pass without faults. Status 0: all are noticed (killed), save those marked `equivalent`; 1: one survives
that should not, or is killed though it is marked; 2: a list is wrong, or its tests fail as they are.
"""

import argparse
import ast
import contextlib
import functools
import gc
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import forked  # noqa: E402

OWN = ("sslctl", "tests")  # packages that every child imports afresh
HEAVY = (  # imported once, before the forks
    *("torch", "torch.testing", "torch.utils.data", "torch.utils.checkpoint", "torch.utils.tensorboard"),
    *("tensorboard.backend.event_processing.event_accumulator", "safetensors.torch", "timm.models.vision_transformer"),
    *("torchvision.transforms.v2", "torchvision.models", "torchvision.datasets", "lightly.loss", "numpy.testing"),
    *("hydra.core.hydra_config", "hydra._internal.config_loader_impl", "omegaconf", "jinja2", "rich.progress"),
    *("sklearn.cluster", "sklearn.metrics", "sklearn.linear_model", "sklearn.manifold", "sklearn.pipeline"),
    *("sklearn.neighbors", "scipy.optimize", "scipy.stats", "PIL.ImageDraw"),
)
QUIET = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
LIMIT = 300.0  # seconds, of tests without a fault
PATIENCE = (20.0, 6.0)  # with one: seconds, and times as long as without
PASSED = 0  # pytest's status
VERDICTS = ("killed", "equivalent", "survived", "killed, though marked equivalent")
WRONG = VERDICTS[2:]


class WrongList(Exception):
    """A list that cannot be run."""


@dataclass(frozen=True)
class Trial:
    """Tests to run, and the text that `file` has meanwhile, if any."""

    tests: tuple[str, ...]
    file: str = ""
    text: str = ""
    limit: float = LIMIT


@dataclass(frozen=True)
class Fault:
    """One entry of a list. line: of `old`. text: the whole file, with the fault."""

    file: str
    line: int
    old: str
    new: str
    text: str
    tests: tuple[str, ...]
    equivalent: str


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: pytest's status (a signal's number, negated, if one ended it; None past its limit), seconds, output."""

    status: int | None
    seconds: float
    printed: str


def chosen_lists(names: list[str], root: Path) -> list[Path]:
    """The lists in order of their paths; names: stems, files or folders."""
    home = root.resolve() / "scripts" / "mutations"
    every = sorted(home.rglob("*.yaml"))
    chosen = set()
    for name in names:
        places = {Path(name).resolve(), home / name}
        of_name = [path for path in every if path.stem == name or places & {path, *path.parents}]
        chosen.update(of_name or [home / f"{name}.yaml"])  # the last is not there, which reading it says
    return sorted(chosen) if names else every


def read_lists(names: list[str], root: Path) -> tuple[list[Fault], list[str]]:
    """The faults of the lists of these names, and what is wrong with them."""
    faults, wrong = [], []
    for path in chosen_lists(names, root):
        try:
            faults += read_faults(path, root)
        except (WrongList, OSError, yaml.YAMLError) as error:
            wrong.append(str(error))
    return faults, wrong


def read_faults(path: Path, root: Path) -> list[Fault]:
    """The faults of a list.

    Raises:
        WrongList: a key is missing or unknown, `old` does not stand exactly once, or the fault is none: no Python, or the same.
    """
    faults = []
    for entry in yaml.safe_load_all(path.read_text()):
        if not isinstance(entry, dict) or set(entry) != {"file", "tests", "faults"} or not entry["faults"]:
            raise WrongList(f"{path}: a list has the keys file, tests and faults")
        text = (root / entry["file"]).read_text()
        for fault in entry["faults"]:
            texts = all(isinstance(v, str) and (v or name == "new") for name, v in fault.items())
            if not texts or not {"old", "new"} <= set(fault) <= {"old", "new", "equivalent"}:
                raise WrongList(f"{path}: a fault has old, new and perhaps equivalent, all of them texts: {fault}")
            old, new = fault["old"], fault["new"]
            if (count := text.count(old)) != 1:
                raise WrongList(f"{path}: this stands {count} times in {entry['file']}, not once: {old}")
            changed = text.replace(old, new)
            if not _differs(entry["file"], text, changed):
                raise WrongList(f"{path}: with this nothing changes, or it is no Python: {new}")
            line, equivalent = text[: text.index(old)].count("\n") + 1, fault.get("equivalent", "")
            faults.append(Fault(entry["file"], line, old, new, changed, tuple(map(str, entry["tests"])), equivalent))
    return faults


@functools.lru_cache(2)
def _meaning(file: str, text: str) -> object:
    return yaml.safe_load(text) if file.endswith(".yaml") else ast.dump(ast.parse(text))


def _differs(file: str, text: str, changed: str) -> bool:
    """Whether it is a fault at all: other code or values, not only other comments."""
    try:
        return _meaning(file, text) != _meaning(file, changed)
    except (SyntaxError, yaml.YAMLError):
        return False


def run_all(trials: list[Trial], jobs: int, root: Path) -> Iterator[Outcome]:
    """Yields the outcomes in order, of `jobs` forked children at a time."""
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:

        def tasks() -> Iterator[forked.Task]:
            for number, trial in enumerate(trials):
                place = Path(folder, str(number))
                place.mkdir()
                work = functools.partial(_test, trial, place, root)
                yield forked.Task(number, work, place / "printed", place / "printed", trial.limit)

        with contextlib.closing(forked.run(tasks(), jobs)) as every:
            for number in range(len(trials)):
                while number not in outcomes:
                    ended = next(every)
                    place = Path(folder, str(ended.name))
                    printed = (place / "printed").read_text(errors="replace")
                    outcomes[ended.name] = Outcome(ended.status, ended.seconds, printed)
                    shutil.rmtree(place, ignore_errors=True)
                yield outcomes.pop(number)


def _test(trial: Trial, place: Path, root: Path) -> int:
    """Runs the tests with the fault; returns pytest's status."""
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    sys.path.insert(0, str(root))
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    if trial.file.startswith("configs/"):
        _read_configs_with(trial, place, root)
    elif trial.file:
        _import_with(trial, root)
    marks = () if "-m" in trial.tests else ("-m", "not slow and not gpu")
    return int(pytest.main([*QUIET, f"--basetemp={place / 'tmp'}", *marks, *trial.tests]))


def _import_with(trial: Trial, root: Path) -> None:
    """From here on the file's module is compiled from the trial's text, whatever is on disk and in __pycache__."""
    file, get_code = str(root / trial.file), SourceFileLoader.get_code

    def code(loader: SourceFileLoader, name: str):
        return compile(trial.text, file, "exec", dont_inherit=True) if loader.path == file else get_code(loader, name)

    SourceFileLoader.get_code = code


def _read_configs_with(trial: Trial, place: Path, root: Path) -> None:
    """From here on configurations are composed of a copy of configs with the trial's text."""
    shutil.copytree(root / "configs", place / "configs")
    (place / trial.file).write_text(trial.text)
    importlib.import_module("sslctl.config.schema").CONFIGS = place / "configs"


def main(words: list[str], root: Path = ROOT, heavy: Sequence[str] = HEAVY) -> int:
    """Runs what `words` ask for and returns the exit status."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scripts/mutate", description=__doc__, formatter_class=as_written)
    parser.add_argument("names", nargs="*", help="lists to run, by name, file or folder (all)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="tests at a time (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="name the test that notices each fault")
    args = parser.parse_args(words)
    begin = time.monotonic()
    faults, wrong = read_lists(args.names, root)
    if wrong:
        print(*wrong, sep="\n")
        return 2
    for name in heavy:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    gc.freeze()  # children share what they do not change

    seconds = {}
    selections = list(dict.fromkeys(fault.tests for fault in faults))
    for tests, outcome in zip(selections, run_all([Trial(t) for t in selections], args.jobs, root), strict=True):
        if outcome.status == PASSED:
            seconds[tests] = outcome.seconds
        else:
            print(f"without a fault: pytest {' '.join(tests)} ends with {outcome.status}:\n{outcome.printed}")
    if len(seconds) < len(selections):
        return 2

    trials = [Trial(f.tests, f.file, f.text, PATIENCE[0] + PATIENCE[1] * seconds[f.tests]) for f in faults]
    counts = Counter()
    for fault, outcome in zip(faults, run_all(trials, args.jobs, root), strict=True):
        verdict = _verdict(fault, outcome)
        counts[verdict] += 1
        hung = " (did not end)" if outcome.status is None else ""
        if verdict in WRONG or args.verbose or hung:
            noticed = [line for line in outcome.printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
            print(f"{verdict}{hung}: {fault.file}:{fault.line}", *noticed)
            print(f"  - {fault.old}\n  + {fault.new}", flush=True)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    print(f"{len(faults)} faults: {summary}; {time.monotonic() - begin:.0f} s")
    return int(any(counts[verdict] for verdict in WRONG))


def _verdict(fault: Fault, outcome: Outcome) -> str:
    if fault.equivalent:
        return "equivalent" if outcome.status == PASSED else "killed, though marked equivalent"
    return "survived" if outcome.status == PASSED else "killed"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
