"""sslctl data as one HTML page: what a folder of images holds, class by class, in the style of the run report."""

from dataclasses import dataclass

import torch

from sslctl.data.audit import Audit
from sslctl.data.description import Description
from sslctl.data.sources import Source
from sslctl.report.images import Sheet, sheet, spread, thumbnails
from sslctl.report.page import environment
from sslctl.runs.directory import now, versions

_MOST_CLASSES, _PICTURES, _SIDE = 40, 12, 72  # sheets; images of one; pixels of an image
_MEASURED = 200  # images whose values are looked at, channel by channel


@dataclass(frozen=True)
class Suggestion:
    """The command that trains on a folder. words: why so; measured: what a few of its steps took on this machine."""

    command: str
    words: str
    measured: list[str]


@dataclass(frozen=True)
class Split:
    """A split's rows of the page's tables. classes: (name, images), the largest first."""

    name: str
    images: int
    unreadable: int
    origin: str
    sizes: str
    classes: list[tuple[str, int]]

    @property
    def largest(self) -> int:
        return max(count for _, count in self.classes)


def data_page(
    seen: Audit,
    described: dict[str, Description],
    source: Source,
    title: str,
    suggestion: Suggestion,
    skipping: str,
) -> str:
    """Returns the page as HTML.

    described: of each split. source: the training images, with others in the place of those that cannot be read. skipping: the
    words that let these be.
    """
    page = {
        "title": title,
        "splits": [_split(seen, split, description) for split, description in described.items()],
        "doubts": [warning for description in described.values() for warning in description.warnings],
        "suggestion": suggestion,
        "channels": _channels(source),
        "looked_at": min(_MEASURED, len(source)),
        "sheets": _sheets(source),
        "unreadable": [(look.path, look.error) for look in seen.unreadable],
        "skipping": skipping,
        "alike": [("The same bytes", seen.copies), ("Nearly the same", seen.near)],
        "shared": seen.shared() if len(seen.layouts) > 1 else None,
    }
    return environment().get_template("data_page.html").render(page=page, made=now(), versions=versions())


def _split(seen: Audit, split: str, described: Description) -> Split:
    layout, looks = seen.layouts[split], seen.looks[split]
    counts = sorted(zip(layout.classes, layout.class_sizes(), strict=True), key=lambda pair: -pair[1])
    sizes = described.lines()[1]
    return Split(split, len(looks), sum(bool(look.error) for look in looks), layout.origin, sizes, counts)


def _channels(source: Source) -> list[tuple[float, float, float, float]]:
    """Returns (least, mean, std, largest) of each channel, of some images."""
    values = []
    for row in spread(len(source), _MEASURED, seed=0).tolist():
        image = source.read(row)
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        flat = image.flatten(1)
        values.append(torch.stack([flat.amin(1), flat.mean(1), (flat**2).mean(1), flat.amax(1)]))
    least, mean, square, largest = torch.stack(values).unbind(1)  # (N, C) each
    std = (square.mean(0) - mean.mean(0) ** 2).clamp(0).sqrt()
    columns = (least.amin(0), mean.mean(0), std, largest.amax(0))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _sheets(source: Source) -> list[tuple[str, Sheet]]:
    """Returns some images of each class, or some of all where there are none, as (name, sheet)."""
    has = source.targets if source.targets is not None else source.labels[:, None] == torch.arange(len(source.classes))
    kinds = [(name, has[:, number].nonzero()[:, 0]) for number, name in enumerate(source.classes)]
    kinds = kinds[:_MOST_CLASSES] or [("images", torch.arange(len(source)))]
    most = _PICTURES if source.classes else 4 * _PICTURES
    sheets = []
    for number, (name, rows) in enumerate(kinds):
        if len(rows):
            chosen = rows[torch.from_numpy(spread(len(rows), most, seed=0))]
            tiles = thumbnails(source, chosen, resize=round(_SIDE * 256 / 224), side=_SIDE, workers=0)
            sheets.append((name, sheet(f"class{number}", tiles)))
    return sheets
