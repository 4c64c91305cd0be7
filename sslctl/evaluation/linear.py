"""Linear classifiers on frozen features: all settings of a grid trained at once, the best picked without the test split."""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl import signals
from sslctl.data.sampler import permuted
from sslctl.errors import InputError
from sslctl.evaluation.features import Features
from sslctl.evaluation.keeping import keep
from sslctl.evaluation.knn import score_results
from sslctl.evaluation.labelled_rows import draw_labels, folds, too_few
from sslctl.evaluation.multi_label import METRIC, mean_average_precision
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task, amount_in_words, draw_number, label_amount
from sslctl.runs.results import Result

_LEAST_STEPS = 300  # few labels make few batches; the optimum needs steps all the same
_LEAST_EPOCHS = 10  # most_steps cuts no training shorter than that


@dataclass(frozen=True)
class ProbeGrid:
    """The settings a probe is chosen from, and how each is trained."""

    lr: list[float]
    weight_decay: list[float]
    epochs: int
    batch_size: int
    validation: float  # share of the training split that picks among them
    most_steps: int | None = None  # of one training; None: all that the epochs are

    def settings(self) -> list[tuple[float, float]]:
        return list(product(self.lr, self.weight_decay))

    def middle(self) -> tuple[float, float]:
        """Returns (lr, weight_decay) for labels that are too few to choose by; of an even number the lower one."""
        lr, decay = sorted(self.lr), sorted(self.weight_decay)
        return lr[(len(lr) - 1) // 2], decay[(len(decay) - 1) // 2]


@dataclass(frozen=True)
class Classifiers:
    """G linear classifiers over standardised features."""

    weight: Tensor  # (G, D, C)
    bias: Tensor  # (G, 1, C)
    mean: Tensor  # (D,)
    std: Tensor  # (D,)

    def scores(self, features: Tensor) -> Tensor:
        """Returns the scores of features: (N, D) -> (G, N, C)."""
        return (features - self.mean) / self.std @ self.weight + self.bias

    def tensors(self) -> dict[str, Tensor]:
        """Returns the first of them as `keep` writes it: weight (D, C), bias (C,), mean and std (D,)."""
        return {"weight": self.weight[0], "bias": self.bias[0, 0], "mean": self.mean, "std": self.std}


def steps_of(n: int, epochs: int, batch_size: int, most_steps: int | None = None) -> int:
    """Returns the steps that `epochs` of n rows are: more where they are too few to arrive, at most most_steps or ten epochs."""
    per_epoch = n // min(batch_size, n)
    total = epochs * per_epoch
    if most_steps is not None:
        total = min(total, max(most_steps, _LEAST_EPOCHS * per_epoch))
    return max(_LEAST_STEPS, total)


@torch.no_grad()
def train_classifiers(
    data: Features,
    settings: list[tuple[float, float]],
    epochs: int,
    batch_size: int,
    seed: int,
    most_steps: int | None = None,
) -> Classifiers:
    """Trains multinomial logistic regression by SGD (momentum 0.9, cosine), every (lr, weight_decay) in one matrix product.

    Of several labels an image: one logistic regression a label. Features are standardised with the training rows' statistics, so
    that one grid suits every feature scale.
    """
    several = data.targets is not None
    mean, few = data.features.mean(0), len(data.labels) < 2  # one image may have all the labels that were drawn
    std = (torch.zeros_like(mean) if few else data.features.std(0)).clamp(min=1e-6)
    x = (data.features - mean) / std  # (N, D)
    (n, dim), classes, count = x.shape, data.num_classes, len(settings)
    target = data.targets.float() if several else F.one_hot(data.labels, classes).float()  # (N, C)
    lr = torch.tensor([s[0] for s in settings]).repeat_interleave(classes)  # (G·C,)
    decay = torch.tensor([s[1] for s in settings]).repeat_interleave(classes)
    weight, bias = torch.zeros(dim, count * classes), torch.zeros(count * classes)
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    batch_size = min(batch_size, n)
    per_epoch = n // batch_size
    total = steps_of(n, epochs, batch_size, most_steps)
    order = torch.arange(n)
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            signals.check()
            if batch_size < n:  # else every batch is all rows
                order = torch.from_numpy(permuted(np.arange(n), n, seed, epoch))
        rows = order[place * batch_size : (place + 1) * batch_size]
        batch = x[rows]  # (b, D)
        logits = torch.addmm(bias, batch, weight).view(-1, count, classes)
        error = (
            (logits.sigmoid() if several else logits.softmax(2))
            .sub_(target[rows][:, None])
            .view(-1, count * classes)
            .div_(batch_size)
        )
        rate = lr * (0.5 * (1 + math.cos(math.pi * step / total)))
        weight_momentum.mul_(0.9).addmm_(batch.T, error).addcmul_(weight, decay)
        bias_momentum.mul_(0.9).add_(error.sum(0))
        weight.sub_(weight_momentum * rate)
        bias.sub_(bias_momentum * rate)
    return Classifiers(
        weight.view(dim, count, classes).transpose(0, 1).contiguous(), bias.view(count, 1, classes), mean, std
    )


def fit_probe(data: Features, grid: ProbeGrid, seed: int) -> tuple[Classifiers, dict]:
    """Picks a setting on a held-out part of the rows, then trains it on all of them.

    Up to 20 rows a class: stratified folds instead of one held-out part, each row judged once. Where a class has a
    single row there is nothing to hold out, and the middle of the grid is taken. Of several labels an image, what is picked
    by is mAP. Returns one classifier and what was picked: {"lr", "weight_decay", "validation_top1" or "validation_mAP"}, the
    last None for the middle, with the number of steps.
    """
    metric = "top1" if data.targets is None else METRIC
    settings, trained = grid.settings(), (grid.epochs, grid.batch_size, seed, grid.most_steps)
    steps = steps_of(len(data.labels), grid.epochs, grid.batch_size, grid.most_steps)
    if too_few(data):
        lr, decay = grid.middle()
        picked = {"lr": lr, "weight_decay": decay, f"validation_{metric}": None, "steps": steps}
        return train_classifiers(data, [(lr, decay)], *trained), picked
    right, loss, count = torch.zeros(len(settings)), torch.zeros(len(settings)), 0
    for held_out in folds(data, grid.validation, seed):
        classifiers, judged = train_classifiers(data.take(~held_out), settings, *trained), data.take(held_out)
        scores, images = classifiers.scores(judged.features), len(judged.labels)
        right += torch.tensor([_right(s, judged) for s in scores])
        loss += torch.stack([_loss(s, judged) for s in scores])
        count += images
    best = max(range(len(settings)), key=lambda g: (right[g].item(), -loss[g].item()))  # equal hits: the surer one
    picked = dict(zip(("lr", "weight_decay"), settings[best], strict=True))
    picked |= {f"validation_{metric}": right[best].item() / count, "steps": steps}
    return train_classifiers(data, [settings[best]], *trained), picked


def _right(scores: Tensor, data: Features) -> float:
    """Returns how many images scores (N, C) are right about; of several labels, mAP times their number."""
    if data.targets is not None:
        return mean_average_precision(scores, data.targets) * len(scores)
    return (scores.argmax(1) == data.labels).sum().item()


def _loss(scores: Tensor, data: Features) -> Tensor:
    if data.targets is not None:
        return F.binary_cross_entropy_with_logits(scores, data.targets.float(), reduction="sum")
    return F.cross_entropy(scores, data.labels, reduction="sum")


# --- The protocol ---

FIXED = "lr {lr:g} and weight decay {weight_decay:g} fixed beforehand, too few labels to choose by"


@dataclass(frozen=True)
class LinearProbe(Protocol):
    """The cached linear probe on all labels, or on several draws of few.

    The seed decides those draws, the held-out parts and the batches' order; the classifier begins with zeros. Of labels
    that are too few to choose lr and weight decay by, results say `FIXED`.
    """

    takes_several = True
    grid: ProbeGrid
    amount: float | None = None
    draws: int = 1

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        train, test = task.read(subject, task.train), task.read(subject, task.test)
        scores, settings, trained = self.scores(train, test, task.seed)
        results = score_results(subject, task.test, scores, **settings)
        return keep("linear", subject, task, results, trained[0].tensors, {}) if len(trained) == 1 else results

    def scores(self, train: Features, test: Features, seed: int) -> tuple[list[Tensor], dict, list[Classifiers]]:
        """Returns the scores (N, C) of the test images of each draw, the settings that their results say, and the classifiers."""
        draws = 1 if self.amount is None else self.draws
        all_scores, picks, trained = [], [], []
        for draw in range(draws):
            # Each draw has its own labels; on all of them there is one.
            number = draw_number(seed, draw)
            rows = torch.arange(len(train.labels))
            if self.amount is not None:
                rows = draw_labels(train.labels, self.amount, number, train.targets)
            labelled = train.take(rows)
            # lr and weight decay are picked without the test split, which is looked at once.
            classifier, picked = fit_probe(labelled, self.grid, seed=number)
            all_scores.append(classifier.scores(test.features)[0])
            picks.append(picked)
            trained.append(classifier)
        choices = len(self.grid.settings())
        params, rule = plain(self.grid) | {"draws": draws, "training_images": len(train.labels)}, ""
        if choices > 1 and None in picks[0].values():  # draws are stratified: all of them, or none
            params["regularisation"] = fixed = FIXED.format(**picks[0])
            rule = f", {fixed}"
        elif choices > 1:
            rule = ", lr and weight decay picked on held-out training images"
        settings = {
            "protocol": "linear-cached",
            "labels": amount_in_words(self.amount),
            "seed": seed,
            "epoch_rule": f"last of {picks[0]['steps']} steps{rule}",
            "params": params,
            "details": {"picked": picks, "grid": choices, "images_with_labels": len(rows)},
        }
        return all_scores, settings, trained


@dataclass(frozen=True)
class LinearProbes(Protocol):
    """The linear probe on all labels, and on draws of each amount of few. Amounts that a class lacks are left out."""

    takes_several = True
    probe: dict
    few_labels: list[float]
    draws: int

    def __post_init__(self):
        for amount in self.few_labels:
            label_amount(amount, "few_labels")

    def __call__(self, subject: Subject, task: Task) -> list[Result]:
        grid = ProbeGrid(**self.probe)
        results = LinearProbe(grid)(subject, task)
        for amount in self.few_labels:
            try:
                results += LinearProbe(grid, amount, self.draws)(subject, task)
            except InputError as error:  # of draw_labels: a class has fewer images
                task.omitted.append(f"few_{error}")
        return results


def plain(grid: ProbeGrid) -> dict:
    """Returns a probe's settings as results name them, in numbers that JSON gives back as they are."""
    return vars(grid) | {"lr": [float(lr) for lr in grid.lr], "weight_decay": [float(d) for d in grid.weight_decay]}
