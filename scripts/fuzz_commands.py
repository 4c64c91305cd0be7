"""Random command lines: does each end with a result, or with a short refusal that leaves nothing behind? scripts/fuzz_commands

    scripts/fuzz_commands                            # 10,000 lines of a seed that it prints
    scripts/fuzz_commands --lines 500 --seed 3
    scripts/fuzz_commands --seed 3 --only 17 291     # these lines of a seed again, with all they print

Each line is a command of its own folder, which holds a small run and a few images, in a child forked from a process that has
imported everything. A line is in order when it ends with status 0 or 2 (or 1 where ONLY_WHILE_RUNNING allows it), when what it
says is sslctl's own words, no traceback and no text of an exception, and, if it is refused, when it says so in a few lines and
leaves its folder as it was. Nothing may be left outside the folder. A line past its time limit is ended and counted as
unfinished. Status 0: all are in order; 1: some are not, each of which is printed.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import io
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import forked  # noqa: E402
from random_commands import EMPTY, FILE, IMAGES, RUN, WEIGHTS, command  # noqa: E402

from sslctl.config.command_line import shell_words  # noqa: E402

LIMIT = 30  # seconds of a line
MEMORY = 3 * 2**30  # bytes of its own that a line may use
LINES = 12  # of a refusal, at most
LONG = 400  # characters of a refusal's line, at most
HEAVY = (
    *(
        "sslctl.cli",
        "torch",
        "torch._dynamo",
        "torch.utils.data",
        "timm",
        "sklearn.linear_model",
        "sklearn.manifold",
        "PIL.Image",
    ),
    *(
        "torch.utils.tensorboard",
        "torchvision.models",
        "hydra.core.hydra_config",
        "hydra._internal.config_loader_impl",
        "rich.table",
    ),
)
RAW = re.compile(  # of Python, torch and other libraries: the texts of exceptions
    r"Traceback|has no len\(\)|object is not|object of type|object has no|\b[A-Z]\w+(Error|Exception|Warning)\b|\bKeyError\b"
    r"|<urlopen|got an unexpected|required positional|unsupported operand|not supported between|<class '|<function|object at 0x"
    r"|index out of range|invalid literal|could not convert|cannot unpack|values to unpack|\[Errno|NoneType|mat1 and mat2"
    r"|size of tensor|sizes of tensors|enforce fail|Expected more than 1 value|cannot be broadcast|\bargument '\w+' \(position"
    r"|must be real number|can't multiply|embedded null|surrogates not allowed|codec can't|LexerNoViableAlt|mismatched input"
)
ONLY_WHILE_RUNNING = (  # status 1 is due: what goes wrong with values that could have gone well
    (
        re.compile(r"not finite|NaN|nan"),
        "a loss, features or weights that grow beyond all numbers are seen when they have",
    ),
    (re.compile(r"memory"), "what fits into this machine is seen when it does not"),
)


@dataclass(frozen=True)
class Line:
    """A command line and how it ended: status (None: past its limit), what it printed, what it changed below its folder."""

    words: list[str]
    status: int | None
    out: str
    err: str
    changed: list[str]


def faults_of(line: Line) -> list[str]:
    """Returns what is not in order about how a line ended."""
    faults = []
    printed = [text for text in line.err.splitlines() if text.strip()]
    if line.status is not None and line.status not in (0, 1, 2):
        faults.append(f"ended with status {line.status}")
    if line.status == 1 and not any(pattern.search(line.err) for pattern, _ in ONLY_WHILE_RUNNING):
        faults.append("failed while running")
    if raw := RAW.search("\n".join(printed)):
        faults.append(f"the text of an exception: {raw[0]}")
    if line.status == 2:
        if not printed or len(printed) > LINES:
            faults.append(f"refused in {len(printed)} lines")
        faults += [f"a line of {len(text)} characters" for text in printed if len(text) > LONG][:1]
        faults += [f"not sslctl's own words: {text[:80]}" for text in printed if not text.startswith("sslctl: ")][:1]
        if line.changed:
            faults.append(f"refused, and left {', '.join(line.changed[:5])}")
    return faults


# --- A line in a child ---


def _listing(box: Path) -> dict[str, tuple]:
    """Path -> size and time of change, of everything below a folder; of folders and links nothing but that they are there."""
    actual = {}
    for folder, names, files in os.walk(box):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):  # of a process that is just ending
                status = os.lstat(path)
                actual[os.path.relpath(path, box)] = (status.st_size, status.st_mtime_ns) if name in files else ()
    return actual


def _in_box(words: list[str], box: Path) -> int:
    """Runs a line in its box, without network and with bounded memory and files."""
    os.chdir(box / "cwd")
    os.environ |= {
        "HOME": str(box / "home"),
        "XDG_CACHE_HOME": str(box / "home" / ".cache"),
        "TMPDIR": str(box / "tmp"),
    }
    os.environ |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers, as in a process of its own
    importlib.import_module("torch").set_num_threads(1)
    dry_run = importlib.import_module("sslctl.training.dry_run")
    dry_run.WARMING, dry_run.TIMED = 1, 1  # steps of plan_only=true: nothing is measured here
    sys.argv = ["sslctl", *words]
    return importlib.import_module("sslctl.cli").main(words)


def _make_template(folder: Path, with_run: bool) -> None:
    """Makes what each line's folder holds: a small run, where one is asked for, images, and files that are neither."""
    from PIL import Image

    cwd = folder / "cwd"
    for place in (folder / "home", folder / "tmp", cwd / EMPTY):
        place.mkdir(parents=True)
    (cwd / FILE).write_text("neither a run nor an image\n")
    (cwd / WEIGHTS).write_bytes(b"no weights")
    for number in range(12):
        path = cwd / IMAGES / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 100, 200)).save(path)
    if not with_run:
        return
    words = (
        "dataset.image_size=8",
        "backbone.widths=[4,8]",
        "method.out_dim=16",
        "method.queue_size=256",
        "trainer.batch_size=256",
    )
    words += (
        "trainer.epochs=1",
        "probe.epochs=1",  # the closing evaluation keeps classifiers for sslctl predict
        "evaluation.cache_gb=0",
        "trainer.threads=1",
        "trainer.tensorboard=false",
    )
    template, words = folder.parent / "template", ["pretrain", f"run_dir={RUN}", *words]
    (ended,) = forked.run(
        [forked.Task(0, functools.partial(_in_box, words, folder), *_printed(template), limit=LIMIT * 10)]
    )
    if ended.status:
        raise RuntimeError(_printed(template)[1].read_text())


def _printed(path: Path) -> tuple[Path, Path]:
    """Returns the files for what a line prints, beside its box."""
    return path.with_name(f"{path.name}.out"), path.with_name(f"{path.name}.err")


def run_lines(
    lines: dict[int, list[str]], jobs: int, limit: float, until: float = float("inf")
) -> Iterator[tuple[int, Line]]:
    """Runs command lines, so many at a time; yields (number, how it ended) as they end. until: none begins after this time."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as name:
        folder, listings = Path(name), {}
        _make_template(folder / "template", with_run=any(RUN in words for words in lines.values()))

        def tasks() -> Iterator[forked.Task]:
            for number, words in lines.items():
                if time.monotonic() > until:
                    return
                box = folder / f"line-{number}"
                shutil.copytree(folder / "template", box, symlinks=True)
                listings[number] = _listing(box)
                yield forked.Task(number, functools.partial(_in_box, words, box), *_printed(box), limit)

        with contextlib.closing(forked.run(tasks(), jobs)) as every:
            for ended in every:
                box, before = folder / f"line-{ended.name}", listings.pop(ended.name)
                after = _listing(box)
                changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
                out, err = (path.read_text(errors="replace") if path.exists() else "" for path in _printed(box))
                shutil.rmtree(box, ignore_errors=True)
                for path in _printed(box):
                    path.unlink(missing_ok=True)
                yield ended.name, Line(lines[ended.name], ended.status, out, err, changed)


# --- All of them ---


def main(words: list[str]) -> int:
    """Runs what `words` ask for and returns the exit status."""
    parser = argparse.ArgumentParser(
        "scripts/fuzz_commands", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=10000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the lines (drawn)")
    parser.add_argument("--file", type=Path, help="a file of command lines, without `sslctl`, instead of random ones")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of lines to run and show")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="lines at a time (%(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a line (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="after which no line begins (%(default)s)")
    args = parser.parse_args(words)
    begin = time.monotonic()
    for name in HEAVY:
        importlib.import_module(name)
    import sslctl.commands.pretrain
    from sslctl.cli import main as sslctl

    with contextlib.redirect_stdout(io.StringIO()):
        sslctl(["pretrain", "--cfg", "job"])  # YAML's and Hydra's own parsers are built
    gc.freeze()  # children share what they do not change
    if args.file:
        lines = {
            number: shlex.split(line) for number, line in enumerate(args.file.read_text().splitlines(), start=1) if line
        }
    else:
        lines = {n: command(random.Random(f"{args.seed}-{n}")) for n in args.only or range(args.lines)}
    print(f"seed {args.seed}: {len(lines)} command lines", flush=True)
    outcomes, wrong, show = Counter(), 0, args.only or args.file
    for number, line in run_lines(lines, args.jobs, args.limit, begin + 60 * args.minutes):
        faults = faults_of(line)
        outcomes["unfinished" if line.status is None else f"status {line.status}"] += 1
        wrong += bool(faults)
        if faults or show:
            print(f"\nline {number}, status {line.status}: {'; '.join(faults) or 'in order'}")
            print(f"  {shell_words(['sslctl', *line.words])}")
            shown = f"{line.out}{line.err}".splitlines() if show else line.err.splitlines()[:6]
            print("\n".join(f"  | {text[:300]}" for text in shown), flush=True)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(
        f"\n{outcomes.total()} lines of seed {args.seed}: {counts}; {wrong} not in order; {time.monotonic() - begin:.0f} s"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
