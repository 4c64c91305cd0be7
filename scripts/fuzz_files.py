"""Does a damaged file ever give another number without a word? One file at a time, by seeded damages: scripts/fuzz_files

    scripts/fuzz_files                          # 200 cases of a seed that is printed
    scripts/fuzz_files --seed 7 --cases 1000
    scripts/fuzz_files --seed 7 --case 41       # one case again, with what it printed

Every file of a finished run, of one that was stopped, and of a folder of PNGs is damaged: bits flipped, cut, zeroed,
overwritten, emptied, lost, a directory or another JSON value in its place. A verb then reads it in a forked child of a process
that has imported everything. Right is: the same numbers as of the whole file; a refusal, of status 2 in at most 12 lines; or a
loss that is named. Status 1: anything else happened, each with the words that repeat it.

A JPEG has no checksum: a bit that is flipped in it is seen by nobody.
"""

import argparse
import contextlib
import functools
import hashlib
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import forked  # noqa: E402

MOST_LINES = 12  # of a refusal
LIMIT = 120.0  # seconds a case
STOPPED_AFTER = {"stopped": 6, "images": 3}  # steps
REPORT = ("images=1", "neighbours=1", "map_images=10", "rows=20", "cache=false", "device=cpu", "out=page.html")
PREDICT = (
    "predict",
    "run",
    "dataset=digits",
    "split=test",
    "classifier=linear",
    "neighbours=2",
    "device=cpu",
    "out=x.csv",
)
KNN = ("knn-eval", "run", "device=cpu", "subjects=[trained,random]", "out=results.jsonl")
# What a command prints of a file that it did not use as it is, beside the file's name.
NAMED = re.compile(
    r"damaged|left out|set aside|written again|restored|warning|calculated again|missing|lost|not as it was"
)
TIMES = re.compile(r"\d{4}-\d\d-\d\d[T ][\d:+]+|[\d,.]+ (?:MiB|KiB|images/s|ms|s)\b|\d+:\d\d")


# --- Damages ---


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def zero(content: bytes, draw: random.Random) -> bytes:
    return _overwrite(content, draw, bytes)


def junk(content: bytes, draw: random.Random) -> bytes:
    return _overwrite(content, draw, draw.randbytes)


def append(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice((b"\n", b"\0" * 100, draw.randbytes(100), b"{}\n", b"1\n"))


def _overwrite(content: bytes, draw: random.Random, make: Callable[[int], bytes]) -> bytes:
    size = min(len(content), draw.choice((1, 16, 512, 4096)))
    at = draw.randrange(len(content) - size + 1)
    return content[:at] + make(size) + content[at + size :]


def other_value(content: bytes, draw: random.Random) -> bytes:
    return draw.choice((b"[]", b"null\n", b"1\n", b'"text"\n', b"{}\n", b'{"step": 1}\n', b"NaN\n", b"[" * 9999, b""))


CHANGES = (flip_bits, flip_bits, flip_bits, cut, cut, zero, junk, append, other_value)


def damage(path: Path, draw: random.Random) -> str:
    """Damages a file; returns how."""
    how = draw.choice((*CHANGES, "directory", "lost"))
    if callable(how) and path.stat().st_size:
        path.write_bytes(how(path.read_bytes(), draw))
        return how.__name__
    path.unlink()
    if how == "directory":
        path.mkdir()
        return how
    return "lost"


def files_of(folder: Path) -> list[Path]:
    """Every file that a command may read, links left out."""
    return sorted(
        p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and not p.name.startswith("events.")
    )


# --- Cases ---


@dataclass(frozen=True)
class Case:
    """subject: finished, stopped or images. words: of the command. Everything else follows from `name`."""

    name: str
    subject: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a command left: its status (None past the limit), what it printed, and the numbers that it made."""

    status: int | None
    printed: str
    numbers: object


def words_of(subject: str, verb: str) -> tuple[str, ...]:
    """Returns a command on the run `run`, in the folder that holds it."""
    if verb == "pretrain":
        return tuple(pretraining(subject))
    return {"runs": ("runs", "run"), "report": ("report", "run", *REPORT), "knn-eval": KNN, "predict": PREDICT}[verb]


def pretraining(subject: str) -> list[str]:
    from tests.runs import PROBE, SIMCLR, command

    words = [*SIMCLR, "evaluation.knn_every_epochs=1", "trainer.save_every_steps=2", "trainer.keep_last=2"]
    if subject == "images":
        return command(Path("run"), *words, "dataset=imagefolder", "dataset.root=images", "trainer.batch_size=8")
    return command(Path("run"), *words, "evaluation.closing=true", *PROBE)


def make_case(seed: int, number: int, verbs: tuple[str, ...]) -> Case:
    draw = random.Random(f"{seed}/{number}/words")
    subject = draw.choice(("finished", "finished", "stopped", "stopped", "images"))
    verb = draw.choice(verbs)
    subject = "finished" if verb == "predict" else subject  # which alone keeps classifiers
    return Case(f"{seed}/{number}", subject, words_of(subject, verb))


def perform(case: Case, base: Path, place: Path, whole: bool) -> tuple[Outcome, str]:
    """Does a case in a copy of its subject; returns its outcome and what was damaged, nothing where it is to stay whole."""
    shutil.copytree(base / case.subject, place, symlinks=True)
    message = ""
    if not whole:
        draw = random.Random(case.name)
        path = draw.choice(files_of(place / ("images" if case.subject == "images" else "run")))
        message = f"{path.relative_to(place)}: {damage(path, draw)}"
    return in_child(case.words, place), message


def in_child(words: tuple[str, ...], place: Path, limit: float = LIMIT) -> Outcome:
    """Runs a command in a forked child, at most so many seconds."""
    work = functools.partial(_command, words, place)
    (ended,) = forked.run([forked.Task(0, work, place / "printed", place / "printed", limit)])
    printed = (place / "printed").read_text(errors="replace")
    return Outcome(ended.status, printed, numbers_of(words[0], place, printed) if ended.status == 0 else None)


def _command(words: tuple[str, ...], place: Path, stop_after: int | None = None) -> int:
    import torch

    from sslctl.cli import main
    from tests.runs import signal_at

    os.chdir(place)
    os.environ |= {"XDG_CACHE_HOME": str(place / "cache"), "COLUMNS": "200"}
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    with signal_at(stop_after):
        return main(list(words))


def numbers_of(verb: str, place: Path, printed: str) -> object:
    """Returns what a command is asked for: results, weights, the page, or its table."""
    if verb == "knn-eval":
        from sslctl.runs.results import read_results

        results = read_results(place / "results.jsonl")
        return [(r.subject, r.metric, r.value, r.ci95, r.step, r.epoch, r.images, r.weights_sha256) for r in results]
    if verb == "predict":
        return (place / "x.csv").read_text()
    if verb == "report":
        return TIMES.sub("", (place / "page.html").read_text().replace(str(place), ""))
    if verb == "runs":
        return TIMES.sub("", printed.replace(str(place), ""))
    from sslctl.runs.checkpoint import newest_valid

    with contextlib.redirect_stderr(None):
        newest = newest_valid(place / "run")
    return newest.name, hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()


def judge(outcome: Outcome, reference: Outcome, damaged: str) -> str:
    """Names how a case ended; what begins with `!` must not be."""
    lines, name = outcome.printed.splitlines(), Path(damaged.partition(":")[0])
    if "Traceback" in outcome.printed:
        return "!traceback"
    if outcome.status is None:
        return "!no end"
    if outcome.status == 2:
        return (
            "refused" if len([line for line in lines if line.startswith("sslctl:")]) <= MOST_LINES else "!long refusal"
        )
    is_named = any(part in outcome.printed for part in (name.name, name.parent.name) if part not in ("run", "images"))
    if outcome.status == 1 and name.parts[0] == "images" and name.name in outcome.printed:
        return "refused while reading images"
    if outcome.status != 0:
        return f"!status {outcome.status}"
    if outcome.numbers == reference.numbers:
        return "the same"
    return "a named loss" if is_named and NAMED.search(outcome.printed) else "!another number"


# --- Running ---


def prepare(base: Path) -> None:
    """Makes the subjects: each in children, since a fork of a process that has trained cannot train."""
    from tests.conftest import write_images

    for subject in ("finished", "stopped", "images"):
        (base / subject).mkdir(parents=True)
        if subject == "images":
            write_images(base / subject / "images", "train/a", "train/b", "test/a", "test/b", count=8, size=(20, 20))
        place = base / subject
        work = functools.partial(_command, tuple(pretraining(subject)), place, STOPPED_AFTER.get(subject))
        (ended,) = forked.run([forked.Task(0, work, place / "printed", place / "printed", LIMIT)])
        if ended.status not in (0, 143):
            raise SystemExit(f"{subject}: status {ended.status}\n{(place / 'printed').read_text()}")
        (place / "printed").unlink()


def main(words: list[str]) -> int:
    """Runs what `words` ask for and returns the exit status."""
    parser = argparse.ArgumentParser(
        "scripts/fuzz_files", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--case", type=int, help="this one alone, with what it printed")
    parser.add_argument("--verbs", default="runs,knn-eval,pretrain,runs,knn-eval,report,predict")
    args = parser.parse_args(words)
    import tests.preloaded  # noqa: F401

    print(f"seed {args.seed}", flush=True)
    numbers = range(args.cases) if args.case is None else [args.case]
    counts, references, begin = Counter(), {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        base, place = Path(folder, "base"), Path(folder, "case")
        prepare(base)
        for number in numbers:
            case = make_case(args.seed, number, tuple(args.verbs.split(",")))
            if (case.subject, case.words) not in references:
                references[case.subject, case.words] = _clean(perform(case, base, place, whole=True), place)[0]
            reference = references[case.subject, case.words]
            if reference.status != 0:
                raise SystemExit(
                    f"the whole {case.subject}: {case.words}: status {reference.status}\n{reference.printed}"
                )
            outcome, damaged = _clean(perform(case, base, place, whole=False), place)
            verdict = judge(outcome, reference, damaged)
            counts[verdict] += 1
            if verdict.startswith("!") or args.case is not None:
                print(f"{verdict}: --seed {args.seed} --case {number}: {case.subject}, {damaged}, {case.words[0]}")
                print("\n".join(f"    {line[:300]}" for line in outcome.printed.splitlines()[-20:]), flush=True)
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    print(f"seed {args.seed}, {sum(counts.values())} cases: {listed}; {time.monotonic() - begin:.0f} s")
    return int(any(verdict.startswith("!") for verdict in counts))


def _clean(performed: tuple[Outcome, str], place: Path) -> tuple[Outcome, str]:
    shutil.rmtree(place)
    return performed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
