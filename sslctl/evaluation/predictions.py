"""What a classifier says of many images: rows for a file, a batch at a time, and their summary."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from sslctl.data.files import ImageError
from sslctl.data.sources import Source
from sslctl.data.tiles import Tiles
from sslctl.evaluation.feature_files import as_utf8
from sslctl.evaluation.features import extract_readable
from sslctl.evaluation.prediction_files import PROBABILITY
from sslctl.evaluation.predictor import Predictor
from sslctl.runs.classifiers import Classifier

Columns = dict[str, list]  # of some rows: name -> a value each, None where there is none

_LISTED = 20  # classes of the summary
_NO_NUMBERS = "the classifier gives no finite numbers"


def rows_of(
    predictor: Predictor, classifier: Classifier, source: Source, *, skip: bool, device: torch.device, **reading: Any
) -> Iterator[Columns]:
    """Yields the rows of all images of a source, in order: name, label, error, top and left of tiles, and what is predicted.

    skip: an image that cannot be read has a row with its error; else it raises ImageError. reading: batch_size and workers.
    """
    begin, classes = 0, [as_utf8(name) for name in source.classes]
    reading |= {"resize": classifier.resize, "device": device}
    with contextlib.closing(extract_readable(predictor.function, source, **reading)) as batches:
        for outputs, unread in batches:
            if unread and not skip:
                raise ImageError(
                    f"{next(iter(unread.values()))}; dataset.on_error=skip gives such images rows with errors"
                )
            numbers = range(begin, begin + len(outputs) + len(unread))
            begin = numbers.stop
            rows = {
                "name": [as_utf8(source.describe(number)) for number in numbers],
                "label": [_label_of(source, classes, number) for number in numbers],
                "error": [as_utf8(str(unread[place])) if place in unread else None for place in range(len(numbers))],
            }
            if isinstance(source, Tiles):
                rows["top"], rows["left"] = ([source.places[number][axis] for number in numbers] for axis in (0, 1))
            if len(outputs):
                rows |= _predicted(predictor, classifier, outputs, rows["error"])
            yield rows


def _predicted(predictor: Predictor, classifier: Classifier, outputs: torch.Tensor, errors: list) -> Columns:
    """Returns the columns of a batch that hold what is predicted. errors: of its rows; those without numbers are added to it."""
    predictions, bank = predictor.predictions(outputs), predictor.bank
    read = [place for place, error in enumerate(errors) if error is None]
    finite = predictions.scores.isfinite().all(1).tolist()
    for place, is_finite in zip(read, finite, strict=True):
        errors[place] = None if is_finite else _NO_NUMBERS

    def spread(values: list) -> list:
        """Returns a value for each row of the batch, None for those that have none."""
        column = [None] * len(errors)
        for place, value, is_finite in zip(read, values, finite, strict=True):
            column[place] = value if is_finite else None
        return column

    columns, probabilities = {}, predictions.probabilities
    if classifier.several:
        for number, name in enumerate(classifier.classes):
            columns[PROBABILITY + name] = spread(probabilities[:, number].tolist())
    else:
        best = predictions.scores.argmax(1)  # as `hits_of` judges
        columns["class"] = spread([classifier.classes[label] for label in best.tolist()])
        columns["probability"] = spread(probabilities.gather(1, best[:, None])[:, 0].tolist())
    for number in range(predictions.rows.shape[1]):
        near = predictions.rows[:, number].tolist()
        columns[f"near_{number + 1}"] = spread([as_utf8(bank.names[row]) for row in near])
        columns[f"near_{number + 1}_class"] = spread([bank.classes_of(row) for row in near])
        columns[f"near_{number + 1}_similarity"] = spread(predictions.similarity[:, number].tolist())
    return columns


def _label_of(source: Source, classes: list[str], number: int) -> str | None:
    """Returns the class that the data name for an image; of several, all with | between them; None where none is named."""
    if source.targets is not None:
        return "|".join(classes[label] for label in source.targets[number].nonzero()[:, 0].tolist())
    label = int(source.labels[number])
    return classes[label] if label >= 0 else None


class Summary:
    """Counts rows as they go by. Its size is that of the number of classes."""

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self.images = self.unread = self.labelled = self.right = 0
        self.counts, self.probability = Counter(), Counter()

    def add(self, rows: Columns) -> None:
        """Counts some rows."""
        self.images += len(rows["name"])
        self.unread += sum(error is not None for error in rows["error"])
        if self.classifier.several:
            for name in self.classifier.classes:
                values = [value for value in rows.get(PROBABILITY + name, []) if value is not None]
                self.counts[name] += sum(value >= 0.5 for value in values)
                self.probability[name] += sum(values)
            return
        if "class" not in rows:  # none of them could be read
            return
        for name, probability, label in zip(rows["class"], rows["probability"], rows["label"], strict=True):
            if name is not None:
                self.counts[name] += 1
                self.probability[name] += probability
                self.labelled += label is not None
                self.right += label == name

    def lines(self) -> list[str]:
        """Returns how many images there are of each class and how probable it is, and how many have none."""
        with_class, several = self.images - self.unread, self.classifier.several
        classes = [(name, count) for name, count in self.counts.most_common() if count or several]
        width = max((len(name) for name, _ in classes[:_LISTED]), default=0)
        lines = []
        for name, count in classes[:_LISTED]:
            of = with_class if several else count
            mean = f"mean probability {self.probability[name] / max(of, 1):.3f}"
            least = ", 0.5 or more" if several else ""
            lines.append(f"  {name:<{width}}  {count:>9,} images{least}  {count / max(with_class, 1):7.2%}  {mean}")
        if len(classes) > _LISTED:
            lines.append(f"  … {len(classes) - _LISTED} other classes")
        if self.labelled:
            lines.append(
                f"  top1 {self.right / self.labelled:.2%} of {self.labelled:,} images whose class the data name"
            )
        if self.unread:
            lines.append(f"  {self.unread:,} of {self.images:,} images have no class: the column error says why")
        return lines
