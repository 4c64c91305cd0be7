"""What `sslctl adapt` makes of public weights on four domains: every recipe, the frozen weights, and training from scratch.

    python scripts/adaptation_benchmark.py --weights FILE --neu-det FOLDER --cifar10 FOLDER    # all; continues where it stopped
    python scripts/adaptation_benchmark.py --weights FILE --domains marks --seeds 0            # needs no data
    python scripts/adaptation_benchmark.py --weights FILE --neu-det FOLDER --domains neu-det --recipes automatic
    python scripts/adaptation_benchmark.py --write docs/adaptation.md      # the tables of what is recorded, runs nothing

| domain | images | what is trained |
|---|---|---|
| neu-det | steel (NEU-DET), numbers up to 240 of each class; the others are judged | four recipes, and what adapt chooses |
| fashion_mnist, cifar10 | 1,500, and 600 that are judged, at 64 px | the two best recipes of neu-det, one from scratch |
| marks | 1,200 textures with a mark of 6 to 10 pixels, made here, and 500 that are judged | simclr, weak_crops |

A row is one command, `sslctl adapt` or, from scratch, `sslctl pretrain` with the same recipe and epochs and then `sslctl
evaluate`. What it gave is a line of docs/adaptation_benchmark.jsonl with its machine and its load; a row that is recorded is
not made again. The best recipes are those of the best online kNN, which asks about training images alone.
"""

import argparse
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from adaptation_benchmark_data import write_cifar10, write_fashion_mnist, write_marks, write_neu_det
from small_benchmark import cpu, results_of, sslctl
from small_benchmark_tables import append, line, put, read

from sslctl.config.recipes import recipe_words

RECORD = Path(__file__).parents[1] / "docs" / "adaptation_benchmark.jsonl"
RECIPES = ("simclr", "weak_crops", "frozen_stages", "diet")  # the others are for vision transformers
AUTOMATIC = (
    "automatic"  # instead of a recipe: adapt with nothing but the folder, the labels, the weights and minutes=10
)
BEST = "best"  # stands for the two best recipes
SEEDS = (0, 1, 2)
NETWORK = ("backbone=timm", "backbone.model=tf_efficientnet_lite0")
LABELS = r"dataset.label=(.+)_\d+"
EPOCHS = "trainer.epochs=12"
SMALL = ("dataset.image_size=64",)
COLUMNS = ("kNN", "linear", "5 labels a class", "online kNN", "minutes")


@dataclass(frozen=True)
class Domain:
    """recipes: of its rows. words: of its images in every command but the automatic one. sizes: of those judged, null: adapt's.

    scratch: whether the first of its recipes is trained from random weights, too.
    """

    make: Callable[[Path | None, Path], Path]
    recipes: tuple[str, ...]
    words: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    scratch: bool = False


DOMAINS = {
    "neu-det": Domain(write_neu_det, (*RECIPES, AUTOMATIC)),
    "fashion_mnist": Domain(write_fashion_mnist, (BEST,), SMALL, ("sizes=[64]",), scratch=True),
    "cifar10": Domain(write_cifar10, (BEST,), SMALL, ("sizes=[64]",), scratch=True),
    "marks": Domain(lambda _, root: write_marks(root), ("simclr", "weak_crops")),
}


@dataclass(frozen=True)
class Row:
    """One command: a recipe on a domain with a seed, from given weights or, without any, from scratch."""

    domain: str
    recipe: str
    seed: int
    weights: Path | None
    out: Path
    threads: int | None = None

    @property
    def name(self) -> str:
        return self.recipe if self.weights else f"{self.recipe}, from scratch"

    @property
    def directory(self) -> Path:
        return self.out / self.domain / f"{self.recipe}{'' if self.weights else '-scratch'}-s{self.seed}"

    @property
    def log(self) -> Path:
        return self.directory.with_suffix(".log")

    def words(self) -> list[str]:
        """The words after `sslctl`."""
        domain = DOMAINS[self.domain]
        words = [*NETWORK, f"dataset.root={self.out / self.domain / 'images'}", LABELS, f"seed={self.seed}"]
        words += [f"run_dir={self.directory}", *([f"trainer.threads={self.threads}"] if self.threads else [])]
        if self.weights is None:
            own = ("dataset=folder", "evaluation.closing=false", "evaluation.knn_every_epochs=null")
            return ["pretrain", *recipe_words(self.recipe), *own, *words, *domain.words, EPOCHS]
        words = ["adapt", *words, f"backbone.weights={self.weights}"]
        if self.recipe == AUTOMATIC:
            return [*words, "minutes=10"]
        return [*words, f"recipes=[{self.recipe}]", *domain.words, *domain.sizes, EPOCHS]


def main() -> None:
    arguments = _arguments()
    if arguments.write:
        recorded = {name: read(arguments.record, name) for name in DOMAINS}
        put(arguments.write, {f"adapt {name}": markdown(records) for name, records in recorded.items() if records})
        return
    sources = {"neu-det": arguments.neu_det, "fashion_mnist": arguments.fashion_mnist, "cifar10": arguments.cifar10}
    failures = []
    for domain in arguments.domains:
        images = arguments.out.absolute() / domain / "images"
        if not images.exists():
            print(f"{domain}: writing {images}", flush=True)
            part = images.with_name("images.part")  # whole or not there
            DOMAINS[domain].make(sources.get(domain), part).rename(images)
        there = {(r["name"], r["seed"]) for r in read(arguments.record, domain)}
        rows = rows_of(domain, arguments)
        missing = [row for row in rows if (row.name, row.seed) not in there]
        failures += [failure for row in missing if (failure := complete(row, arguments.record))]
        print(f"{domain}\n\n{markdown(read(arguments.record, domain))}\n", flush=True)
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="tf_efficientnet_lite0.safetensors, ImageNet's under timm's names")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--neu-det", type=Path, help="the folder with <class>_<number>.jpg")
    parser.add_argument("--cifar10", type=Path, help="the folder with train/<class>/*.jpg and test/<class>/*.jpg")
    parser.add_argument("--fashion-mnist", type=Path, help="the folder of its idx files; default: Debian's")
    parser.add_argument("--recipes", nargs="+", help=f"instead of each domain's own: names, or {AUTOMATIC}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--threads", type=int, help="of a run; default: sslctl's own choice, all cores")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptation_benchmark"), help="where images and runs lie")
    parser.add_argument("--record", type=Path, default=RECORD, help="where their figures are kept")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables into this document, run nothing")
    arguments = parser.parse_args()
    if not arguments.write and not arguments.weights:
        parser.error("--weights FILE is needed")
    needed = {"neu-det": arguments.neu_det, "cifar10": arguments.cifar10}
    for domain in arguments.domains if not arguments.write else ():
        if domain in needed and not needed[domain] and not (arguments.out / domain / "images").exists():
            parser.error(f"--domains {domain} needs --{domain} FOLDER")
    return arguments


# --- Rows ---


def rows_of(domain: str, arguments: argparse.Namespace) -> list[Row]:
    """A seed of every recipe, then the next. Without a choice the best two are those of the recorded rows of neu-det."""
    names = arguments.recipes or DOMAINS[domain].recipes
    if BEST in names:
        names = best_two(read(arguments.record, "neu-det"))
        if len(names) < 2:
            raise SystemExit(f"{domain}: measure --domains neu-det first, or name two: --recipes simclr weak_crops")
    weights, out = arguments.weights.absolute(), arguments.out.absolute()
    pairs = [(name, seed) for seed in arguments.seeds for name in names]
    rows = [Row(domain, name, seed, weights, out, arguments.threads) for name, seed in pairs]
    if DOMAINS[domain].scratch:
        rows += [Row(domain, names[0], seed, None, out, arguments.threads) for seed in arguments.seeds]
    return rows


def best_two(records: list[dict]) -> list[str]:
    """The two recipes of the best online kNN on average: of training images, asked among others of them."""
    asked = {
        name: [r["online kNN"] for r in records if r["name"] == name and r["subject"] == "trained"] for name in RECIPES
    }
    means = {name: statistics.mean(values) for name, values in asked.items() if values}
    return [name for name, _ in sorted(means.items(), key=itemgetter(1), reverse=True)[:2]]


def complete(row: Row, record: Path) -> str | None:
    """Runs a row's command, or goes on with it, and records what it gave; returns its name where that failed."""
    row.directory.parent.mkdir(parents=True, exist_ok=True)
    print(" ".join(["sslctl", *row.words()]), flush=True)
    commands = [row.words()]
    if row.weights is None:
        same = ("protocols=[knn,linear]", "knn.k=[20]", "few_labels=[5]", "draws=10", "subjects=[trained]")
        commands.append(["evaluate", str(row.directory), *same])
    before = os.getloadavg()[0]
    for words in commands:
        status, _ = sslctl(words, row.log, row.threads or len(os.sched_getaffinity(0)))
        if status:
            return f"{row.directory.name} (status {status}, {row.log})"
    records = records_of(row)
    where = {"command": " ".join(row.words()), "load before": before, "torch": torch.__version__, "cpu": cpu()}
    append(record, [r | where for r in records])
    print(json.dumps(records[-1]), flush=True)
    return None


def records_of(row: Row) -> list[dict]:
    """One record of each subject: given and trained weights, or those trained from scratch."""
    about = {"table": row.domain, "name": row.name, "seed": row.seed}
    if row.weights is None:
        return [about | {"subject": "scratch"} | results_of(row.directory, "trained")]
    adaptation = json.loads((row.directory / "adaptation.json").read_text())
    metrics = [json.loads(text) for text in (row.directory / "metrics.jsonl").read_text().splitlines()]
    online = [100 * metric["knn"] for metric in metrics if "knn" in metric]
    seconds = adaptation["seconds"]
    spent = {"minutes": sum(seconds.values()) / 60, "seconds": seconds}
    chosen = {"epochs": round(metrics[-1]["epoch"]), "choices": adaptation["choices"], "recipe": adaptation["recipe"]}
    verdict = {"verdict": adaptation["verdict"]["kind"], "sizes": adaptation["verdict"]["sizes"]}
    return [
        about | {"subject": "given"} | results_of(row.directory, "given") | {"online kNN": online[0]},
        about | {"subject": "trained"} | results_of(row.directory, "trained") | {"online kNN": online[-1]}
        | spent | chosen | verdict,
    ]  # fmt: skip


# --- The table ---


def markdown(records: list[dict]) -> str:
    """A domain's table: the frozen weights, every recipe with its verdicts, then what was trained from scratch."""

    def of(name: str, subject: str) -> list[dict]:
        return [r for r in records if r["name"] == name and r["subject"] == subject]

    head = (*COLUMNS, "verdict")
    lines = [f"| weights | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    # Every recipe has measured the same frozen weights, with the labels that its seed has drawn: a seed counts once.
    frozen = {r["seed"]: r for r in records if r["subject"] == "given"}
    if frozen:
        lines.append(f"{line('as they are', list(frozen.values()), COLUMNS)}  |")
    for name in dict.fromkeys(r["name"] for r in records):
        for subject in ("trained", "scratch"):
            if rows := of(name, subject):
                verdicts = Counter(r["verdict"] for r in rows if "verdict" in r)
                words = ", ".join(f"{kind} {count}×" for kind, count in verdicts.most_common())
                lines.append(f"{line(f'`{name}`', rows, COLUMNS)} {words} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
