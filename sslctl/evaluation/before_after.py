"""Weights before and after an adaptation: each at the size that suits it, by the same measures, and the verdict on both."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.errors import InputError, say
from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import Knn, accuracy, hits_of, neighbours, score_results
from sslctl.evaluation.label_free import choose_rows, rankme
from sslctl.evaluation.labelled_rows import draw_labels, folds, too_few
from sslctl.evaluation.linear import LinearProbe, ProbeGrid, train_classifiers
from sslctl.evaluation.multi_label import mean_average_precision
from sslctl.evaluation.paired import Comparison, Verdict, compare, compare_rankings, verdict_of
from sslctl.evaluation.results import make_result
from sslctl.evaluation.subjects import Subject, judged_at
from sslctl.evaluation.task import Reader, amount_in_words, draw_number
from sslctl.runs.results import Result

PROTOCOL, METRIC = "before-after", "difference"  # of results that hold a comparison
_HELD_OUT = 0.2  # of the labelled training images, by which a size or a recipe is chosen
_DRAWS = 3  # of few labels, to choose by
_IMAGES, _CHOOSING = 25_600, 5_000  # at most, of RankMe, and by which a size is chosen


@dataclass(frozen=True)
class Answers:
    """How a classifier on frozen features answers. scores: (N, C) of the test images, of each draw. settings: of results."""

    measure: str
    scores: list[Tensor]
    settings: dict

    def hits(self, labels: Tensor) -> Tensor:
        """Returns which test images are answered rightly, (R, N) bool."""
        return torch.stack([hits_of(own, labels)["top1"] for own in self.scores])


@dataclass(frozen=True)
class Measures:
    """What networks are compared by: kNN and a linear probe on all labels, and linear probes on draws of few."""

    knn: Knn
    grid: ProbeGrid
    few_labels: tuple[float, ...]
    draws: int

    def answers(self, train: Features, test: Features, seed: int) -> list[Answers]:
        """Answers test images by the labels of training images. Amounts of labels that a class lacks are left out."""
        nearest = neighbours(test.features, train.features, self.knn.k[0])
        votes, settings = self.knn.scores(train, *nearest)
        result = [Answers(f"kNN, k {settings['params']['k']}, all labels", [votes], settings)]
        for amount in (None, *self.few_labels):
            words = "all labels" if amount is None else f"{amount_in_words(amount).replace('/', ' labels a ')}"
            try:
                scores, settings, _ = LinearProbe(self.grid, amount, self.draws).scores(train, test, seed)
            except InputError:  # of draw_labels: a class has fewer images
                continue
            result.append(Answers(f"linear, {words}", scores, settings))
        return result

    def held_out_score(self, train: Features, seed: int) -> tuple[float, list[str]] | None:
        """Returns the mean over all measures of what held-out training images score, with the middle of the grid, and the names
        of the measures; None where none can be held out, or all are of one class."""
        if too_few(train) or not tells_classes(train):
            return None
        scores, names = [], [f"kNN, k {self.knn.k[0]}", "linear"]
        for part in folds(train, _HELD_OUT, seed):
            rest, held_out = train.take(~part), train.take(part)
            labelled_sets = [rest]
            for amount in self.few_labels:
                with contextlib.suppress(InputError):  # of draw_labels: a class has fewer images
                    numbers = [draw_number(seed, draw) for draw in range(min(self.draws, _DRAWS))]
                    row_sets = [draw_labels(rest.labels, amount, number, rest.targets) for number in numbers]
                    labelled_sets += [rest.take(rows) for rows in row_sets]
                    names += [f"linear, {amount_in_words(amount)}, {len(row_sets)} draws"]
            trained = (self.grid.epochs, self.grid.batch_size, seed, self.grid.most_steps)
            probes = [train_classifiers(rows, [self.grid.middle()], *trained) for rows in labelled_sets]
            nearest = neighbours(held_out.features, rest.features, self.knn.k[0])
            all_scores = [self.knn.scores(rest, *nearest)[0], *(probe.scores(held_out.features)[0] for probe in probes)]
            scores += [_score(own, held_out) for own in all_scores]
        return sum(scores) / len(scores), list(dict.fromkeys(names))


def tells_classes(data: Features | Source) -> bool:
    """Tells whether labels can be answered wrongly: of one class alone, every answer is right."""
    return data.targets is not None or len(data.labels.unique()) > 1


def _score(scores: Tensor, judged: Features) -> float:
    """Returns the share of images that scores (N, C) are right about; of several labels an image, the mAP."""
    if judged.targets is not None:
        return mean_average_precision(scores, judged.targets)
    return accuracy(scores, judged.labels)["top1"]


# --- With labels ---


@dataclass(frozen=True)
class Judgement:
    """sizes: of the images each subject is judged at, by its name. results: lines for results.jsonl."""

    verdict: Verdict
    comparisons: list[Comparison]
    sizes: dict[str, int]
    results: list[Result]


def judge(
    given: Subject,
    trained: Subject,
    train: Source,
    test: Source,
    sizes: Sequence[int],
    measures: Measures,
    read: Reader,
    seed: int,
) -> Judgement:
    """Compares a network before and after on the test split, each at the size at which held-out training images score best."""
    counts = torch.bincount(train.labels, minlength=1) if train.targets is None else train.targets.sum(0)
    rarest = int(torch.where(counts > 0, counts, len(train)).argmin())
    for amount in measures.few_labels:
        if amount > counts[rarest]:
            say(f"left out: few_labels=[{amount:g}]: {train.classes[rarest]} has only {int(counts[rarest])} images")
    best_sizes, results, answers_of_both = {}, [], []
    for subject in (given, trained):
        bank, size = features_at_best_size(subject, train, sizes, measures, read, seed)
        at, source = sized(subject, test, size)
        images, best_sizes[subject.name] = read(at, source), size
        answers = measures.answers(bank, images, seed)
        answers_of_both.append(answers)
        results += [result for own in answers for result in score_results(at, source, own.scores, **own.settings)]
        results.append(rankme_of(at, train, bank.features))
    comparisons = []
    for before, after in zip(*answers_of_both, strict=True):
        groups = test.groups
        if test.targets is not None:
            pair = (before.scores, after.scores, test.targets)
            comparisons.append(compare_rankings(before.measure, *pair, len(answers_of_both[0]), groups))
        else:
            pair = (before.hits(test.labels), after.hits(test.labels))
            comparisons.append(compare(before.measure, *pair, len(answers_of_both[0]), groups))
    lines = [
        result_of(comparison, answers, given, judged_at(trained, test), test, best_sizes)
        for comparison, answers in zip(comparisons, answers_of_both[1], strict=True)
    ]
    return Judgement(verdict_of(comparisons), comparisons, best_sizes, [*results, *lines])


def sized(subject: Subject, source: Source, size: int) -> tuple[Subject, Source]:
    """Returns a subject and a source with images of a size."""
    source = replace(source, image_size=size)
    return judged_at(subject, source), source


def features_at_best_size(
    subject: Subject, train: Source, sizes: Sequence[int], measures: Measures, read: Reader, seed: int
) -> tuple[Features, int]:
    """Returns the features of the training images at the size at which held-out ones score best, the first of equal ones."""
    part = train if len(train) <= _CHOOSING else train.subset(choose_rows(_CHOOSING, len(train)).sort().values)
    scores = dict.fromkeys(sizes, 0.0)
    for size in sizes if len(sizes) > 1 else ():
        features = read(*sized(subject, part, size))
        scores[size] = (measures.held_out_score(features, seed) or (0.0, []))[0]
        say(f"  {subject.name} at {size} px: {100 * scores[size]:.1f} % of held-out training images")
    size = max(sizes, key=scores.__getitem__)
    return read(*sized(subject, train, size)), size


def result_of(
    comparison: Comparison, answers: Answers, given: Subject, trained: Subject, test: Source, sizes: dict[str, int]
) -> Result:
    """Returns the line of results.jsonl that holds a comparison: its value is the difference, its interval that of 95 %."""
    details = {key: value for key, value in vars(comparison).items() if key not in ("difference", "ci95")}
    return make_result(
        trained,
        test,
        protocol=PROTOCOL,
        metric=METRIC,
        values=[comparison.difference],
        labels=answers.settings["labels"],
        params={"of": answers.settings["protocol"], **answers.settings["params"], "sizes": sizes},
        seed=answers.settings.get("seed"),
        epoch_rule=answers.settings.get("epoch_rule", "no training"),
        details=details | {"interval": list(comparison.interval), "given": given.weights_sha256},
        ci95=list(comparison.ci95),
    )


# --- Without labels ---


def rankme_of(subject: Subject, source: Source, features: Tensor) -> Result:
    """Returns the RankMe of features (N, D) of the training images."""
    z = features[choose_rows(_IMAGES, len(features))]
    healthy = f"of at most {min(z.shape):,}; more is better, within one method"
    return make_result(
        subject,
        source,
        protocol="label-free",
        metric="rankme",
        values=[rankme(z)],
        share=False,
        labels="none",
        params={"images": len(z)},
        details={"images": len(z), "healthy": healthy},
    )


def common_neighbours(before: Tensor, after: Tensor, k: int = 10) -> float:
    """Returns the share of each image's k nearest others, by features (N, D) before, that are among them after, on average."""
    near = [[row[row != own][:k] for own, row in enumerate(neighbours(z, z, k + 1)[1])] for z in (before, after)]
    shared = [torch.isin(one, other).double().mean() for one, other in zip(*near, strict=True)]
    return torch.stack(shared).mean().item()
