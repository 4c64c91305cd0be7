"""The page's first lines: whether a run is well, the figure that matters with its protocol, and what to do next."""

import math
from dataclasses import dataclass
from pathlib import Path

from sslctl.ops.image_size import as_key, image_size_of
from sslctl.report import commands
from sslctl.report.groups import Group, Mean, given_mean, group_mean, random_mean
from sslctl.report.measurement import GIVEN, Measurement, by_importance, distinguishing_settings, number
from sslctl.report.run import Run
from sslctl.runs.health import verdict
from sslctl.runs.reading import run_word
from sslctl.runs.results import Result

_VERDICTS = {
    "ok": "No warnings",
    "early": "Too early to tell",
    "warn": "Look at the warnings before you go on",
    "bad": "Something is wrong, do not go on with it as it is",
}
_WORST_FIRST = ("bad", "warn", "early")


@dataclass(frozen=True)
class Figure:
    """A number in large type. protocol: how it was measured, always said with it."""

    value: str
    protocol: str
    beside: str  # the figure of random weights and what the difference is worth


@dataclass(frozen=True)
class Step:
    """What to do next, and the command that does it."""

    words: str
    command: str


@dataclass(frozen=True)
class Summary:
    level: str
    verdict: str
    sentences: list[str]
    figures: list[Figure]
    steps: list[Step]


def summary_of_one(run: Run, columns: list[Measurement]) -> Summary:
    facts, names = run.facts, run.names
    kinds = {"vocabulary": "texts", "frames": "videos"}
    images = next((words for key, words in kinds.items() if key in run.config["dataset"]), "images")
    done = (
        f"{names['method']} trained {run.network} on {facts['num_images']:,} {images} of {run.dataset}"
        f" for {run.epochs:.4g} of {facts['total_steps'] / facts['steps_per_epoch']:g} epochs"
        f" ({run.step:,} of {facts['total_steps']:,} steps); it is {_status(run)}."
    )
    begun = [f"It began with given weights: {run.began_with()}."] if run.began_with() else []
    sentences = [done, *begun, *_what_was_logged(run, columns)]
    apart, best = distinguishing_settings(columns), _main(run, columns)[:2]
    figures = [_figure(run, column, apart[column]) for column in best]
    worst, opening = verdict(run.findings).sentence, _VERDICTS[run.level]
    reason = worst[len(opening) :].lstrip(": ") if worst.lower().startswith(opening.lower()) else worst
    return Summary(run.level, f"{opening}: {reason}.", sentences, figures, _next_steps(run, columns))


def _main(run: Run, columns: list[Measurement]) -> list[Measurement]:
    """Returns the main measurements, the one that matters most first; of nearest neighbours, the run's own k alone."""
    k, main = run.config["evaluation"]["knn"]["k"], [column for column in by_importance(columns) if column.main]

    def own_k(column: Measurement) -> str:
        bank = dict(column.settings).get("bank")  # of fewer images all are neighbours
        return f", k {min(k, int(bank)) if bank else k}"

    return [column for column in main if column.k in ("", own_k(column))] or main


def _status(run: Run) -> str:
    return {"running": "still running", "finished": "finished", "stopped": "not finished"}[run.status]


def _what_was_logged(run: Run, columns: list[Measurement]) -> list[str]:
    """Returns what can be said without a test split."""
    knn, loss, sentences = run.series("knn"), run.series("loss"), []
    if not columns and knn:
        sentences.append(
            f"Its online kNN went from {knn[0][1]:.1%} to {knn[-1][1]:.1%} (top-1 among training images, which are"
            " pretrained on: good for following one run, not for comparing)."
        )
    if not columns and not knn and not run.facts.get("num_classes"):
        sentences.append(
            "There are no labels, so nothing here measures accuracy: the verdict rests on what was logged, and the"
            " neighbours and the map below show what the features hold to be alike."
        )
    if len(loss) > 1 and not columns:
        sentences.append(f"Its loss went from {loss[0][1]:.4g} to {loss[-1][1]:.4g}.")
    return sentences


def _figure(run: Run, column: Measurement, apart: str) -> Figure:
    trained, random = run.latest("trained")[column], run.latest(GIVEN).get(column) or run.untrained().get(column)
    where = f"{column.describe()} ({trained.images:,} images)"
    return Figure(
        number(column.share, trained.value, trained.std),
        f"{where}, {apart}" if apart else where,
        "" if random is None else _beside(trained, random),
    )


def _beside(trained: Result, random: Result) -> str:
    """Says what the same network with given or random weights reaches, and whether the difference is more than chance."""
    gain = trained.value - random.value
    chance = 1.96 * math.sqrt(sum(r.value * (1 - r.value) / r.images for r in (trained, random)))
    untrained = {"scratch": "from scratch", GIVEN: "given weights"}.get(random.subject, "random weights")
    words = f"{untrained}: {number(trained.share, random.value)}, {100 * gain:+.1f} points"
    if abs(gain) <= chance:
        words += f"; {trained.images:,} test images cannot tell less than {100 * chance:.1f} points from chance"
    return words


_LONGER = "Train longer: after so few steps no run can be judged"


def _next_steps(run: Run, columns: list[Measurement]) -> list[Step]:
    where, cwd = run_word(run.path), run.environment["cwd"]
    steps, sound = [], run.finished and run.level in ("ok", "warn")
    if run.level == "bad":
        words = "Read what is wrong under Health, and start anew: this command, with what you change behind it"
        steps.append(Step(words, commands.repeat_with(run)))
    elif not run.finished and run.status != "running":
        steps.append(Step("Continue it where it stopped: the same command again", commands.started_with(run)))
    elif run.finished and run.level == "early":
        steps.append(Step(_LONGER, commands.longer([run])))
    labelled = bool(run.facts.get("num_classes")) or bool(run.config.get("eval_dataset"))
    if not labelled:
        words = ["labels=5", "dataset=imagefolder", "dataset.root=FOLDER"]
        words += (
            [f"dataset.image_size={as_key(image_size_of(run.facts['image_size']))}"]
            if "image_size" in run.facts
            else []
        )
        command = commands.placed(cwd, ["sslctl", "linear-eval", where, *words])
        steps.append(Step("Label a few images, one folder a class, and measure what the features are worth", command))
    elif not columns:
        steps.append(Step("Measure it on the test split", commands.placed(cwd, ["sslctl", "linear-eval", where])))
    elif run.level != "bad" and not any(column.labels != "all" for column in columns):
        command = commands.placed(cwd, ["sslctl", "linear-eval", where, "labels=5"])
        steps.append(Step("See what it is worth with few labels", command))
    if sound:
        steps.append(Step("Take the weights away", commands.placed(cwd, ["sslctl", "export", where])))
    if sound and columns:
        steps.append(Step("One seed says little about a method: repeat it", commands.more_seeds([run])))
    return steps


# --- Several runs ---


def summary_of_many(runs: list[Run], groups: list[Group], columns: list[Measurement], where: str) -> Summary:
    """Summarises several runs. where: the words that name all of them on a command line."""
    unfinished = [run for run in runs if not run.finished]
    seeds = sorted({len(group.runs) for group in groups})
    each = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    sentences = [
        f"{len(runs)} runs on {runs[0].dataset}: {len(groups)} setting{'s' * (len(groups) > 1)},"
        f" {each} seed{'s' * (each != '1')} each."
    ]
    if unfinished:
        sentences.append(
            f"{len(unfinished)} of them {'is' if len(unfinished) == 1 else 'are'} not finished and left out of every"
            f" mean: {_listed([run.label for run in unfinished])}."
        )
    for level, words in (("bad", "Something is wrong in"), ("warn", "Warnings in"), ("early", "Too early to tell of")):
        labels = [run.label for run in runs if run.level == level]
        if labels:
            sentences.append(f"{words} {len(labels)} of {len(runs)} runs: {_listed(labels)}.")
    figures, best = [], _most_telling(groups, columns)
    if best:
        figures, ranking = _ranking(runs, groups, best, distinguishing_settings(columns)[best])
        sentences += ranking
    level = next((level for level in _WORST_FIRST if any(run.level == level for run in runs)), "ok")
    steps = [Step("Continue what is not finished", commands.started_with(run)) for run in unfinished[:3]]
    early = [group for group in groups if any(run.finished and run.level == "early" for run in group.runs)]
    steps += [Step(f"{group.name}: {_LONGER.lower()}", commands.longer(group.runs)) for group in early[:3]]
    if not columns and runs[0].facts.get("num_classes"):
        steps.append(Step("Measure all of them on the test split", f"sslctl linear-eval {where}"))
    if best and seeds[0] < 3:
        words = "fewer than three seeds say little: add some"
        few = [group for group in groups if len(group.runs) < 3 and group not in early][:5]
        steps += [Step(f"{group.name}: {words}", commands.more_seeds(group.runs)) for group in few]
    if best and not any(column.labels != "all" for column in columns):
        steps.append(Step("See what they are worth with few labels", f"sslctl linear-eval {where} labels=5"))
    return Summary(level, f"{_VERDICTS[level]}.", sentences, figures, steps)


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _most_telling(groups: list[Group], columns: list[Measurement]) -> Measurement | None:
    """Returns the main measurement that most settings have; of several, the one that matters most."""
    main = _main(groups[0].runs[0], columns)
    return max(main, key=lambda column: sum(group_mean(g, column) is not None for g in groups), default=None)


def _ranking(runs: list[Run], groups: list[Group], column: Measurement, apart: str) -> tuple[list[Figure], list[str]]:
    """Returns the two best settings by a measurement, and whether their seeds tell them apart. apart: from others of its kind."""
    means = [(group, group_mean(group, column)) for group in groups]
    ranked = sorted(((g, m) for g, m in means if m), key=lambda pair: -pair[1].value)
    if not ranked:
        return [], []
    where = ", ".join(part for part in (column.describe(), apart) if part)
    figures = [
        Figure(
            mean.describe(column),
            f"{group.name}: {where}",
            f"mean{' ± std' if mean.std else ''} over {_seeds(mean)}"
            + (f"; 95 % interval of the mean {mean.interval(column)}" if mean.ci95 else ""),
        )
        for group, mean in ranked[:2]
    ]
    sentences = []
    given = given_mean(runs, column)
    random = given or random_mean(runs, column)
    if random:
        (first, best), untrained = (
            ranked[0],
            "Given weights"
            if given
            else "From scratch, networks"
            if column.protocol == "finetune"
            else "Random weights",
        )
        words = f"{untrained} reach {random.describe(column)} by {where}"
        sentences.append(f"{words}; {first.name} is {_apart(best, random)}.")
    if len(ranked) > 1:
        (first, best), (second, next_) = ranked[:2]
        sentences.append(f"By the same protocol {first.name} is, against {second.name}, {_apart(best, next_)}.")
    unmeasured = [group.name for group, mean in means if mean is None and group.finished]
    if unmeasured:
        sentences.append(f"Not measured by it, and so not compared: {_listed(unmeasured)}.")
    return figures, sentences


def _apart(mean: Mean, other: Mean) -> str:
    """Returns '2.3 points better, …': by how much one mean lies above another, and what that is worth."""
    gap = 100 * (mean.value - other.value)
    words = f"{abs(gap):.1f} points {'better' if gap >= 0 else 'worse'}"
    if mean.std is None or other.std is None:
        return f"{words} (one seed does not tell them apart)"
    error = 100 * math.sqrt(mean.std**2 / mean.count + other.std**2 / other.count)
    certainty = "more" if abs(gap) > 2 * error else "no more"
    return f"{words} ({certainty} than twice the standard error over seeds, {2 * error:.1f})"


def _seeds(mean: Mean) -> str:
    return "1 seed" if mean.count == 1 else f"{mean.count} seeds"


def title_of(runs: list[Run], common: Path) -> str:
    return runs[0].label if len(runs) == 1 else f"{len(runs)} runs in {common.name or common}"
