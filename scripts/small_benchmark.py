"""Every method with a network for CPUs on Fashion-MNIST, 60,000 images seen each: one table, by one command.

    python scripts/small_benchmark.py                    # all of it, hours on one core; continues where it was stopped
    python scripts/small_benchmark.py --methods moco byol --jobs 2
    python scripts/small_benchmark.py --data cifar10 --root ~/cifar10-jpeg     # the methods that need colour
    python scripts/small_benchmark.py --data sequences                         # videos and texts, by their own task
    python scripts/small_benchmark.py --write docs/small_benchmark.md     # the tables of what is recorded, runs nothing

Every run is `sslctl pretrain` in a process of its own with one thread, then `knn-eval` and `linear-eval` of the finished
run. What it gave is a line of docs/small_benchmark.jsonl, with the machine; a run that is recorded is not made again.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from small_benchmark_data import most_frequent_token, write_passing, write_texts
from small_benchmark_recipes import NAMED, SEEDS, TABLES, Table
from small_benchmark_tables import append, markdown, read, write

RECORD = Path(__file__).parents[1] / "docs" / "small_benchmark.jsonl"
TUNING = ("labels=0.01", "draws=1", "trainer.threads=1", "trainer.device=cpu")
COLUMNS = {
    ("knn", "all"): "kNN",
    ("linear-cached", "all"): "linear",
    ("linear-cached", "5/class"): "5 labels a class",
    ("finetune", "0.01"): "1 % fine-tuned",
}
PROBES = {"kNN": ["knn-eval"], "linear": ["linear-eval"], "5 labels a class": ["linear-eval", "labels=5"]}


@dataclass(frozen=True)
class Run:
    """One row's run of one seed. name: of a recipe, or of a longer run of it: byol+3, of three epochs."""

    name: str
    seed: int
    folder: Path
    data: str
    places: tuple[tuple[str, Path], ...]  # of {root} and other folders in the recipes

    @property
    def table(self) -> Table:
        return TABLES[self.data]

    @property
    def directory(self) -> Path:
        return self.folder / f"{self.name}-s{self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.directory.name}.log"

    def words(self) -> list[str]:
        """The overrides of `sslctl pretrain`."""
        recipe, _, epochs = self.name.partition("+")
        words = [f"method={recipe.partition('-')[0]}", *self.table.common, *self.table.recipes[recipe]]
        words += [f"seed={self.seed}", f"run_dir={self.directory}", *([f"trainer.epochs={epochs}"] if epochs else [])]
        return [word.format(folder=self.folder, **dict(self.places)) for word in words]

    def teacher(self) -> "Run | None":
        """The table's run that this one learns from."""
        learns = any("{folder}/moco-s0" in word for word in self.table.recipes[recipe_of(self.name)])
        return Run("moco", 0, self.folder, self.data, self.places) if learns else None


def main() -> None:
    arguments = _arguments()
    if arguments.write:
        write(arguments.record, arguments.write)
        return
    table, folder = TABLES[arguments.data], arguments.out.absolute() / arguments.data
    names = arguments.methods or list(table.recipes)
    unknown = [name for name in names if recipe_of(name) not in table.recipes]
    if unknown:
        raise SystemExit(f"no recipe for {', '.join(unknown)}; there are: {', '.join(table.recipes)}")
    folder.mkdir(parents=True, exist_ok=True)
    places = {"root": arguments.root}
    if arguments.data == "sequences":
        write_passing(folder / "videos" / "train", 192, seed=0)
        write_passing(folder / "videos" / "test", 400, seed=1)
        places = {"videos": folder / "videos", "texts": write_texts(folder / "texts")}
    of_many = NAMED if arguments.data == "fashion_mnist" else ()
    pairs = [(name, seed) for name in names for seed in arguments.seeds or (SEEDS if name in of_many else [0])]
    runs = [
        Run(name, seed, folder, arguments.data, tuple(places.items()))
        for name, seed in sorted(pairs, key=itemgetter(1))  # a seed of all, then the next
    ]
    there = {(r["name"], r["seed"]) for r in read(arguments.record, arguments.data) if _whole(r, table)}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        missing = [run for run in runs if (run.name, run.seed) not in there]
        failed = [name for name in pool.map(lambda run: complete(run, arguments.record), missing) if name]
    print(markdown(read(arguments.record, arguments.data), table))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=TABLES, default="fashion_mnist", help="which table")
    parser.add_argument("--root", type=Path, help="the folder with CIFAR-10's train/<class>/ and test/<class>/")
    parser.add_argument("--out", type=Path, default=Path("runs/small_benchmark"), help="where the runs lie")
    parser.add_argument("--record", type=Path, default=RECORD, help="where their figures are kept")
    parser.add_argument("--methods", nargs="+", help="name, or name+EPOCHS for a longer run")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: 0, and {SEEDS} for {', '.join(NAMED)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables into this document, run nothing")
    arguments = parser.parse_args()
    if arguments.data == "cifar10" and not arguments.root and not arguments.write:
        parser.error("--data cifar10 needs --root FOLDER")
    return arguments


def recipe_of(name: str) -> str:
    """Of a run or a longer one: byol of byol+3."""
    return name.partition("+")[0]


def _whole(record: dict, table: Table) -> bool:
    """Whether a trained run's record has all that is measured."""
    tuned = recipe_of(record["name"]) in table.fine_tuned
    return "MiB" in record and (not tuned or "1 % fine-tuned" in record)


def complete(run: Run, record: Path) -> str | None:
    """Trains and evaluates what is missing of a run and records it; returns its name where that failed."""
    teacher = run.teacher()
    failure = (train(teacher) if teacher else None) or train(run)
    if failure:
        return failure
    subjects = ["trained"]
    if run.name in run.table.random or run.data == "sequences":
        subjects.append("random")
    if run.name == run.table.pixels and run.seed == 0:
        subjects.append("pixels")
    for column, words in PROBES.items():
        wanted = [s for s in subjects if column not in results_of(run.directory, s)]
        if wanted and (column in run.table.columns):
            verb, *more = words
            status, _ = sslctl([verb, str(run.directory), f"subjects=[{','.join(wanted)}]", *more], run.log)
            if status:
                return f"{run.directory.name} {verb} (status {status})"
    if recipe_of(run.name) in run.table.fine_tuned and "1 % fine-tuned" not in results_of(run.directory, "trained"):
        status, _ = sslctl(["finetune", str(run.directory), *TUNING], run.log)
        if status:
            return f"{run.directory.name} finetune (status {status})"
    records = records_of(run, subjects)
    append(record, records)
    print(json.dumps(records[0]), flush=True)
    return None


def train(run: Run) -> str | None:
    """Trains a run to its end; returns its name where that failed."""
    if (run.directory / "cost.json").exists():
        return None
    shutil.rmtree(run.directory, ignore_errors=True)  # cut short: a part of a run has no cost of a whole one
    status, usage = sslctl(["pretrain", *run.words()], run.log)
    if status:
        return f"{run.directory.name} (status {status})"
    cost = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 2**10}
    (run.directory / "cost.json").write_text(json.dumps(cost))
    return None


def sslctl(words: list[str], log: Path, threads: int = 1) -> tuple[int, resource.struct_rusage]:
    """Runs `sslctl …` with so many threads to its end: exit status, and what it used."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sslctl", *words], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage


def results_of(directory: Path, subject: str) -> dict[str, float]:
    """Column -> percent, of the results that a run's directory has."""
    path = directory / "results.jsonl"
    actual = {}
    for record in [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []:
        if record["subject"] == subject and record["metric"] == "top1":
            name = COLUMNS.get((record["protocol"], record["labels"]))
            if name:
                actual[name] = 100 * record["value"]
    return actual


def records_of(run: Run, subjects: list[str]) -> list[dict]:
    """One record a subject: the columns, and where they were measured."""
    metrics = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in metrics if "loss" in record]
    row = {"feature std": logged[-1]["feature_std"]}
    spent = json.loads((run.directory / "cost.json").read_text())
    facts = json.loads((run.directory / "environment.json").read_text())["facts"]
    batch = next(int(w.partition("=")[2]) for w in reversed(run.words()) if w.startswith("trainer.batch_size="))
    row |= {"images/s": facts["total_steps"] * batch / spent["cpu_seconds"], "MiB": spent["peak_mib"]}
    if run.data == "sequences":
        late = logged[-max(1, len(logged) // 10) :]
        places = dict(run.places)
        chance = {"frame_order": 75.0, "frame_order-order": 100 / 12}.get(run.name) or most_frequent_token(
            places["texts"]
        )
        row |= {"own task": 100 * statistics.fmean(record["accuracy"] for record in late), "chance": chance}
        row |= {f"random weights, {name}": value for name, value in results_of(run.directory, "random").items()}
    scratch = results_of(run.directory, "scratch")
    row |= {"1 % from scratch": scratch["1 % fine-tuned"]} if scratch else {}
    about = {"table": run.data, "name": run.name, "seed": run.seed}
    where = {"torch": torch.__version__, "cpu": cpu()}
    rows = {"trained": results_of(run.directory, "trained") | row}
    rows |= {subject: results_of(run.directory, subject) for subject in subjects[1:] if run.data != "sequences"}
    return [about | {"subject": subject} | values | where for subject, values in rows.items()]


def cpu() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return names[0] if names else "unknown"


if __name__ == "__main__":
    main()
