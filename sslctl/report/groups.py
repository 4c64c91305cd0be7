"""Runs side by side: which belong together, what tells them apart, and means with their spread over seeds."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from sslctl.errors import InputError
from sslctl.evaluation.results import interval_of_mean
from sslctl.ops.image_size import image_size_of, in_words
from sslctl.report.measurement import GIVEN, Measurement, number, span
from sslctl.report.run import Run

MOST_DIFFERENCES = 40  # keys that are listed


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed. number: its place in the page's colours."""

    name: str
    runs: tuple[Run, ...]
    number: int

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.finished)


def refuse_other_datasets(runs: list[Run]) -> None:
    """Raises InputError with one run of each dataset when there are several."""
    by_dataset: dict[tuple, Run] = {}
    for run in runs:
        by_dataset.setdefault((run.names["dataset"], run.environment.get("hashes", {}).get("data")), run)
    if len(by_dataset) > 1:
        named = [f"{run.label} on {_dataset(run)}" for run in list(by_dataset.values())[:3]]
        more = "; …" if len(by_dataset) > 3 else ""
        raise InputError(f"these runs were trained on different images and are not compared: {'; '.join(named)}{more}")


def _dataset(run: Run) -> str:
    """Returns 'folder photos (1,600 of size 32)'."""
    root = run.config["dataset"].get("root")
    name = f"{run.names['dataset']} {root}" if root else run.names["dataset"]
    return f"{name} ({run.facts['num_images']:,} of size {in_words(image_size_of(run.facts['image_size']))})"


def groups_of(runs: list[Run]) -> list[Group]:
    """Runs by everything but their seed, in the order given, named by what tells them apart."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.group, []).append(run)
    sets = [tuple(sorted(same, key=lambda run: run.config["seed"])) for same in members.values()]
    return [Group(name, same, i) for i, (name, same) in enumerate(zip(_names(sets), sets, strict=True))]


def _names(sets: list[tuple[Run, ...]]) -> list[str]:
    """Names each group by what tells it from the others, in few words."""
    first = [runs[0] for runs in sets]
    columns = [[run.names[key] for run in first] for key in ("method", "backbone")]
    parts = [column for column in columns if len(set(column)) > 1] or columns[:1]
    names = [" ".join(column[i] for column in parts) for i in range(len(first))]
    if len(set(names)) == len(names):
        return names
    keys = [key for key, values in differences(first) if not key.startswith("names.")]
    settings = [", ".join(f"{key}={_short(run.keys.get(key))}" for key in keys[:3]) for run in first]
    names = [f"{name} {own}" for name, own in zip(names, settings, strict=True)]
    return [f"{name} ({run.group})" if names.count(name) > 1 else name for name, run in zip(names, first, strict=True)]


def differences(runs: Iterable[Run]) -> list[tuple[str, list]]:
    """Returns (key, its value in each run) of every key that decides weights and differs; those of a method last."""
    runs = list(runs)
    keys = dict.fromkeys(key for run in runs for key in ("names.method", "names.backbone", *run.fingerprint_keys))
    both = [(key, [{**run.fingerprint_keys, **run.keys}.get(key) for run in runs]) for key in keys]
    different = [(key, values) for key, values in both if any(value != values[0] for value in values)]
    return sorted(different, key=lambda pair: (not pair[0].startswith("names."), pair[0].startswith("method.")))


def difference_rows(groups: list[Group]) -> list[tuple[str, list[str]]]:
    """Returns (key, its words in each group) of what differs, at most MOST_DIFFERENCES."""
    different = differences(group.runs[0] for group in groups)
    return [(key, [_short(value) for value in values]) for key, values in different[:MOST_DIFFERENCES]]


def _short(value: object) -> str:
    text = "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@dataclass(frozen=True)
class Mean:
    """A measurement over the finished runs of a group. std, ci95: over seeds, None for one."""

    value: float
    std: float | None
    count: int
    ci95: list[float] | None = None

    def describe(self, column: Measurement) -> str:
        return number(column.share, self.value, self.std)

    def interval(self, column: Measurement) -> str:
        """Returns '88.1–91.9 %': where the mean lies, to 95 %; '' of one seed."""
        return span(column, self.ci95)


def mean_of(values: list[float]) -> Mean | None:
    if not values:
        return None
    if len(values) == 1:
        return Mean(values[0], None, 1)
    return Mean(statistics.fmean(values), statistics.stdev(values), len(values), interval_of_mean(values))


def columns_of(runs: list[Run]) -> list[Measurement]:
    """Returns every measurement of trained weights, in the order in which they were first made."""
    return list(dict.fromkeys(m for run in runs for m in run.latest("trained")))


def group_mean(group: Group, column: Measurement) -> Mean | None:
    """Returns the mean of trained weights over the group's finished runs that have it."""
    results = [run.latest("trained").get(column) for run in group.finished]
    return mean_of([result.value for result in results if result])


def random_mean(runs: list[Run], column: Measurement) -> Mean | None:
    """Returns the mean of random weights, each network and seed once: several methods may begin with the same."""
    values = {}
    for run in runs:
        if result := run.untrained().get(column):
            values[str(run.config["backbone"]), run.config["seed"], result.value] = result.value
    return mean_of(list(values.values()))


def given_mean(runs: list[Run], column: Measurement) -> Mean | None:
    """Returns the mean of the weights that runs were given to begin with, each once."""
    results = [result for run in runs if (result := run.latest(GIVEN).get(column))]
    return mean_of(list({(result.weights_sha256, result.value): result.value for result in results}.values()))
