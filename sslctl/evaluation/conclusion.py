"""The end of an adaptation: the given and the trained weights of a run beside one another, and what is said of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslctl.data.modality import IMAGES
from sslctl.data.sources import Source
from sslctl.errors import InputError, say
from sslctl.evaluation import subjects as who
from sslctl.evaluation.before_after import Measures, common_neighbours, judge, rankme_of, sized
from sslctl.evaluation.console import show, show_comparisons, tested_on
from sslctl.evaluation.knn import neighbours as nearest
from sslctl.evaluation.label_free import rankme
from sslctl.evaluation.provenance import origin_of
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Reader
from sslctl.factory.from_config import refuse_size
from sslctl.runs.checkpoint import newest_valid
from sslctl.runs.directory import RESULTS
from sslctl.runs.results import Result, append_results, read_results

NO_LABELS = "no labels"  # the kind of a verdict that cannot be reached
_COMPARED = 1000  # images whose neighbours are compared


def subjects_of(run_dir: Path) -> tuple[Subject, Subject]:
    """Returns the weights that a finished run began with, and those that it ended with."""
    given, trained = who.given_to(run_dir, None), who.trained(run_dir, newest_valid(run_dir), None)
    return tuple(replace(s, origin=origin_of(run_dir, None, s.name)) for s in (given, trained))


def conclude(
    run_dir: Path,
    judges: tuple[Source, Source | None],
    sizes: list[int],
    measures: Measures,
    read: Reader,
    seed: int,
    neighbours: int,
) -> dict[str, Any]:
    """Compares a run's weights before and after, appends results.jsonl, and returns the verdict: kind, sentence and sizes.

    judges: the images, (train, test); without test, what needs no labels is compared. sizes: that are tried besides that of
    training. neighbours: of how many images the nearest are named.
    """
    train, test = judges
    given, trained = subjects_of(run_dir)
    say("  comparing before and after")

    # Nothing that is measured without labels tells better from worse, so that there is no verdict then.
    if test is None:
        return without_labels(run_dir, given, trained, train, read, neighbours)

    # Results are written before the verdict that rests on them: a kill between the two leaves them, and they are measured again.
    judgement = judge(given, trained, train, test, usable_sizes(given, train, sizes), measures, read, seed)
    append_once(run_dir, judgement.results)
    show([r for r in judgement.results if r.share and r.metric != "difference"], f"{tested_on(test)}, frozen features")
    show_comparisons(judgement.comparisons, judgement.sizes)
    return vars(judgement.verdict) | {"sizes": judgement.sizes}


def usable_sizes(subject: Subject, train: Source, sizes: list[int]) -> list[int]:
    """Returns the sizes at which a network can be judged, that of training first; says which it cannot take."""
    own, usable = train.image_size, []
    for size in sizes if train.modality == IMAGES else ():
        try:
            refuse_size(subject.backbone, size, "sizes")
            usable.append(size)
        except InputError as error:
            say(f"left out: sizes=[{size}]: {str(error).partition(': ')[2]}")
    return list(dict.fromkeys([own, *usable]))


def append_once(run_dir: Path, results: list[Result]) -> None:
    """Appends results, but those that a kill has left there without the verdict."""
    there = {_content(r) for r in read_results(run_dir / RESULTS)}
    append_results(run_dir / RESULTS, [r for r in results if _content(r) not in there])


def _content(r: Result) -> tuple:
    """Returns what tells a result of one run from its others."""
    return r.protocol, r.metric, r.subject, r.labels, r.preprocess, str(r.params), r.value


def without_labels(
    run_dir: Path, given: Subject, trained: Subject, train: Source, read: Reader, count: int
) -> dict[str, Any]:
    """Compares what can be without labels: directions that the features use, and whom they hold to be alike."""
    # How many directions features use, of all images: of few they are fewer.
    features = {s.name: read(s, train).features for s in (given, trained)}
    results = [rankme_of(s, train, features[s.name]) for s in (given, trained)]
    append_once(run_dir, results)

    # Whom they hold to be alike: a sample is enough for a share, and for names to look at.
    rows = torch.arange(0, len(train), max(1, len(train) // _COMPARED))
    before, after = (features[name][rows] for name in ("given", "trained"))
    ranks = " → ".join(f"{r.value:.1f}" for r in results)
    shared = common_neighbours(before, after)
    say(*named_neighbours(train, rows, before, after, count))
    sentence = (
        f"no verdict without labels: RankMe {ranks}, {shared:.0%} of the ten nearest images are the same as before; neither"
        " says which is better. Label some images, of two classes at least, and give the same command with eval_dataset=…"
    )
    return {"kind": NO_LABELS, "sentence": sentence, "sizes": dict.fromkeys(features, train.image_size)}


def named_neighbours(train: Source, rows: Tensor, before: Tensor, after: Tensor, count: int) -> list[str]:
    """Returns for a few images, spread over all, which others are nearest before and after."""
    lines = []
    for query in torch.arange(0, len(rows), max(1, len(rows) // count))[:count].tolist():
        lines.append(f"  {train.describe(int(rows[query]))}")
        for when, features in (("before", before), ("after", after)):
            near = [row for row in nearest(features[query : query + 1], features, 4)[1][0].tolist() if row != query][:3]
            lines.append(f"    {when:<6} {', '.join(train.describe(int(rows[row])) for row in near)}")
    return lines


def score_of_trial(
    trial: Path, judges: tuple[Source, Source | None], measures: Measures, read: Reader, seed: int, neighbours: int
) -> tuple[float, list[str]]:
    """Returns what a recipe's trial is chosen by, and the names of its measures: the mean share of held-out training images that
    its features answer rightly; RankMe, which compares recipes badly, where there are no labels. The test split is not looked
    at."""
    train = judges[0]
    trained = subjects_of(trial)[1]
    features = read(*sized(trained, train, train.image_size))
    score = measures.held_out_score(features, seed) if train.labelled or train.has_several else None
    return (rankme(features.features), ["RankMe"]) if score is None else score
