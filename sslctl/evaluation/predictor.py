"""A kept classifier at work: from images to scores, probabilities and the nearest labelled images."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sslctl.errors import InputError
from sslctl.evaluation import subjects as who
from sslctl.evaluation.features import Features
from sslctl.evaluation.keeping import names_in
from sslctl.evaluation.knn import neighbours, shares_of, votes_of
from sslctl.evaluation.linear import Classifiers
from sslctl.factory.from_run import load_method
from sslctl.methods.supervised import Supervised
from sslctl.models.batchnorm import group_batchnorm
from sslctl.models.preprocess import Preprocess, TextPreprocess, preprocess_from
from sslctl.runs.checkpoint import CheckpointError, compare, load_tensors
from sslctl.runs.checksums import digest_of_file
from sslctl.runs.classifiers import Classifier, unfit
from sslctl.runs.directory import BACKBONE, PROBES


@dataclass(frozen=True)
class Bank:
    """Labelled images: their features with labels, and what each is called."""

    features: Features
    names: list[str]
    classes: list[str]

    def classes_of(self, row: int) -> str:
        """Returns the class of a labelled image; of several, all with | between them."""
        if self.features.targets is None:
            return self.classes[self.features.labels[row]]
        return "|".join(self.classes[label] for label in self.features.targets[row].nonzero()[:, 0].tolist())


@dataclass(frozen=True)
class Predictions:
    """Of B images. scores: (B, C), by whose largest the evaluation judged; probabilities: (B, C). similarity, rows: (B, n) of the
    nearest in the bank, n = 0 without one."""

    scores: Tensor
    probabilities: Tensor
    similarity: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Predictor:
    """function: images (B, C, S, S) in [0, 1], or (B, L) ids of texts, -> (B, D), what `predictions` takes. modules: the networks
    that it runs through. bank: whose images are named as the nearest; None: none are."""

    function: Callable[[Tensor], Tensor]
    predictions: Callable[[Tensor], Predictions]
    modules: tuple[nn.Module, ...]
    bank: Bank | None


def build_predictor(
    run: Path, checkpoint: Path, classifier: Classifier, kept_bank: Classifier | None, nearest: int
) -> Predictor:
    """Builds a classifier of a run. kept_bank: the kept kNN whose images are named as the nearest, `nearest` of them.

    Raises InputError for files that do not fit together, each by its name.
    """
    tensors = _checked(run, classifier)
    bank = None if kept_bank is None else _bank(run, kept_bank, _checked(run, kept_bank))
    if classifier.kind == "finetune":
        return _finetuned(run, checkpoint, classifier, tensors, bank, kept_bank, nearest)
    subject = _frozen(run, checkpoint, classifier)
    width = tensors["features" if classifier.kind == "knn" else "weight"].shape[int(classifier.kind == "knn")]
    if subject.width() != width:
        raise unfit(classifier, run, f"takes {width} features, the run gives {subject.width()}")

    def scores_of(features: Tensor) -> tuple[Tensor, Tensor]:
        if classifier.kind == "linear":
            head = Classifiers(tensors["weight"][None], tensors["bias"], tensors["mean"], tensors["std"])
            return _with_probabilities(head.scores(features)[0], classifier.several)
        return _knn_scores(features, classifier, own_bank)

    own_bank = _bank(run, classifier, tensors) if classifier.kind == "knn" else None

    def predictions(features: Tensor) -> Predictions:
        return Predictions(*scores_of(features), *_nearest(features, bank, nearest))

    return Predictor(subject.function, predictions, (subject.module,), bank)


def _finetuned(
    run: Path,
    checkpoint: Path,
    classifier: Classifier,
    tensors: dict[str, Tensor],
    bank: Bank | None,
    kept_bank: Classifier | None,
    nearest: int,
) -> Predictor:
    """Builds a fine-tuned network. The nearest are by the run's frozen features, which its other network gives."""
    network = _load_finetuned(run, classifier, tensors)
    classes, subject = len(classifier.classes), None if bank is None else _frozen(run, checkpoint, kept_bank)

    def function(images: Tensor) -> Tensor:
        logits = network.classifier(network.pooled(images)).float()  # (B, C)
        return logits if subject is None else torch.cat([logits, subject.function(images).float()], 1)

    def predictions(outputs: Tensor) -> Predictions:
        scores = _with_probabilities(outputs[:, :classes], classifier.several)
        return Predictions(*scores, *_nearest(outputs[:, classes:], bank, nearest))

    return Predictor(function, predictions, (network, *([subject.module] if subject else [])), bank)


def _frozen(run: Path, checkpoint: Path, classifier: Classifier) -> who.Subject:
    """Returns the run's network, whose features a classifier takes. Raises InputError for other weights than it was fitted on."""
    subject = who.trained(run, checkpoint, classifier.features)
    if subject.weights_sha256 != classifier.weights_sha256:
        raise unfit(classifier, run, f"is of other weights than {checkpoint}")
    return replace(subject, preprocess=preprocess_of(classifier, run))


def preprocess_of(classifier: Classifier, run: Path) -> Preprocess | TextPreprocess:
    """Returns how images become the classifier's input. Raises InputError where its file does not say so."""
    try:
        return preprocess_from(classifier.preprocess)
    except InputError as error:
        raise unfit(classifier, run, f"does not say what it takes: {error}") from error


def _load_finetuned(run: Path, classifier: Classifier, tensors: dict[str, Tensor]) -> Supervised:
    """Reads the fine-tuned network from the directory of its training, in eval mode."""
    settings, method = classifier.settings, load_method(run)
    if Path(settings["directory"]).name != settings["directory"] or settings["directory"] in ("", ".", ".."):
        raise unfit(classifier, run, f"names {settings['directory']!r}, no directory in {run / PROBES}")
    path = run / PROBES / settings["directory"] / BACKBONE
    if not path.is_file():
        raise unfit(classifier, run, f"is of {path}, which is missing")
    if digest_of_file(path) != settings["sha256"]:
        raise unfit(classifier, run, f"is of {path}, which does not hold what it was kept with")
    if settings["network"] == "teacher" and not hasattr(method, "teacher_backbone"):
        raise unfit(classifier, run, "is of a teacher, which the run's method has not")
    backbone = method.teacher_backbone if settings["network"] == "teacher" else method.backbone
    backbone = group_batchnorm(copy.deepcopy(backbone), 1)
    weights = load_tensors(path)
    if differences := compare(weights, backbone.state_dict()):
        raise CheckpointError(f"{path} is of another network than the run's:", *differences)
    backbone.load_state_dict(weights)
    facts = replace(method.facts, num_classes=len(classifier.classes))
    try:
        network = Supervised(
            backbone, facts, frozen=False, pool=settings["pool"], layer_decay=1.0, classifier_lr_scale=1.0
        )
    except ValueError as error:
        raise unfit(classifier, run, f"does not fit the run: {error}") from error
    if differences := compare(tensors, network.classifier.state_dict()):
        raise CheckpointError(f"{classifier.path} is of another network than the run's:", *differences)
    network.classifier.load_state_dict(tensors)
    return network.eval()


def _with_probabilities(scores: Tensor, several: bool) -> tuple[Tensor, Tensor]:
    """Returns scores (B, C) with probabilities: of one class an image they add up to 1, of several each stands alone."""
    return scores, scores.double().sigmoid() if several else scores.double().softmax(1)


def _knn_scores(features: Tensor, classifier: Classifier, bank: Bank) -> tuple[Tensor, Tensor]:
    """Returns votes (B, C) as the evaluation counted them, and their shares."""
    settings = classifier.settings
    # As many are searched as in the evaluation: where several are equally near, these are the same then.
    similarity, rows = (t[:, : settings["k"]] for t in neighbours(features, bank.features.features, settings["depth"]))
    temperature = settings["temperature"]
    if bank.features.targets is not None:
        shares = shares_of(similarity, bank.features.targets, rows, temperature=temperature)
        return shares, shares
    votes = votes_of(similarity, bank.features.labels[rows], len(bank.classes), temperature=temperature)
    return votes, votes / votes.sum(1, keepdim=True)


def _nearest(features: Tensor, bank: Bank | None, count: int) -> tuple[Tensor, Tensor]:
    """Returns the similarity (B, n) and rows (B, n) of the labelled images nearest to each."""
    if bank is None:
        return torch.empty(len(features), 0), torch.empty(len(features), 0, dtype=torch.long)
    return neighbours(features, bank.features.features, count)


# --- What the files hold ---


def _checked(run: Path, classifier: Classifier) -> dict[str, Tensor]:
    """Reads a classifier's tensors. Raises InputError where they are not what its kind has, or hold no finite numbers."""
    try:
        tensors = classifier.tensors()
    except CheckpointError as error:
        raise unfit(classifier, run, "is damaged") from error
    classes, shapes = len(classifier.classes), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if classifier.kind == "knn":
        rows, width = (*shapes.get("features", ()), 0, 0)[:2]
        expected = {"features": (rows, width), "labels": (rows,), "names": shapes.get("names", ())[:1]}
        expected |= {"targets": (rows, classes)} if classifier.several else {}
    else:
        width = (*shapes.get("weight", ()), 0, 0)[:2][int(classifier.kind == "finetune")]
        expected = {
            "weight": (classes, width) if classifier.kind == "finetune" else (width, classes),
            "bias": (classes,),
        }
        expected |= {"mean": (width,), "std": (width,)} if classifier.kind == "linear" else {}
    if shapes != expected or not classes or not all(shapes[name] and shapes[name][0] for name in shapes):
        raise unfit(classifier, run, f"holds {shapes}, no {classifier.kind} classifier of {classes} classes")
    kinds = {"labels": torch.int64, "names": torch.uint8, "targets": torch.bool}
    odd = [name for name, tensor in tensors.items() if tensor.dtype != kinds.get(name, torch.float32)]
    odd += [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if odd:
        raise unfit(classifier, run, f"holds other values than a classifier's: {', '.join(sorted(odd))}")
    return tensors


def _bank(run: Path, classifier: Classifier, tensors: dict[str, Tensor]) -> Bank:
    """Returns the labelled images of a kept kNN. Raises InputError where names and labels are not theirs."""
    names, labels, settings = names_in(tensors["names"]), tensors["labels"], classifier.settings
    labels_fit = classifier.several or (int(labels.min()) >= 0 and int(labels.max()) < len(classifier.classes))
    usable = 1 <= settings["k"] <= settings["depth"] and settings["temperature"] > 0
    if len(names) != len(labels) or not labels_fit or not usable:
        raise unfit(classifier, run, "holds labels, names or settings that are no kNN's")
    features = Features(tensors["features"], labels, len(classifier.classes), tensors.get("targets"))
    return Bank(features, names, classifier.classes)
