"""What TensorBoard shows of a run beside its numbers: views, neighbours, the method's own pictures, a map of features."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl import signals
from sslctl.data.loader import clean_batches
from sslctl.data.modality import IMAGES
from sslctl.data.sources import Source
from sslctl.evaluation.knn import neighbours
from sslctl.evaluation.online import EmbeddedImages
from sslctl.methods.base import Method
from sslctl.models.preprocess import Preprocess
from sslctl.ops.color_space import visible
from sslctl.training.plan import Plan
from sslctl.views import ViewMaker
from sslctl.views.maker import clean
from sslctl.visuals.method_pictures import sheet_of
from sslctl.visuals.sheets import cell, sheet_of_views

LOOKS = 20  # of a run, evenly, that leave pictures, beside its first and last: each is tens to hundreds of KiB
PICTURED = 8  # images of a picture
NEIGHBOURS = 5  # of each
DRAWS = 2  # of each image's views
MAPPED, MAP_DIM = 2_000, 64  # images and dimensions of the embedding projector: what a browser turns smoothly
THUMBNAIL = 32  # pixels
MAP = "features"  # its tag, and the folder of its files below that of the step


@dataclass(frozen=True)
class Board:
    """source: what is trained on; evaluation_source: whose images the features are of. All in eval mode, by the first process."""

    source: Source
    evaluation_source: Source
    views: ViewMaker
    preprocess: Preprocess
    seed: int
    plan: Plan
    workers: int

    def __call__(self, writer, method: Method, step: int, embedded: EmbeddedImages) -> None:
        """Views at the start; what the method makes of images, and neighbours, at some looks; a map of them at the end.

        writer: a SummaryWriter.
        """
        if not is_pictured(self.plan, step):
            return
        if self.source.modality == IMAGES and step == 0:  # the frames of a video are shown by its method
            rows = torch.arange(0, len(self.source), max(1, len(self.source) // PICTURED))[:PICTURED]
            writer.add_image("views", sheet_of_views(self.source, self.views, rows, seed=self.seed, draws=DRAWS), step)
        sheet = sheet_of(method, self.source, self.views, seed=self.seed, images=PICTURED)
        if sheet is not None:
            writer.add_image("pictures", sheet, step)
        if not self.evaluation_source.modality.visible:
            return
        writer.add_image("neighbours", self.neighbours(embedded), step)
        if step == self.plan.total_steps:
            self.map(writer, step, embedded)

    def neighbours(self, embedded: EmbeddedImages) -> Tensor:
        """(3, H, W): a few images and those most like them."""
        count = min(PICTURED, embedded.queries)
        nearest = (
            embedded.queries
            + neighbours(embedded.features[:count], embedded.features[embedded.queries :], NEIGHBOURS)[1]
        )
        places = torch.cat([torch.arange(count)[:, None], nearest], 1)  # (n, 1 + k) into embedded
        batches = clean_batches(self.evaluation_source, embedded.rows[places.flatten()], **self._reading(0))
        return sheet_of_neighbours(torch.cat(list(batches)).unflatten(0, places.shape))

    def map(self, writer, step: int, embedded: EmbeddedImages) -> None:
        """Writes the embedding projector: features with thumbnails, labels where there are any, and names."""
        source, rows = self.evaluation_source, embedded.rows[:MAPPED]
        images = []
        for batch in clean_batches(source, rows, **self._reading(self.workers)):
            signals.check()
            images.append(thumbnails(batch))
        texts, header = [_word(source.describe(row)) for row in rows.tolist()], None
        if source.labelled:
            header = ["label", "image"]  # of one column alone, TensorBoard takes none
            labels = [_word(source.classes[label]) for label in source.labels[rows].tolist()]
            texts = [list(pair) for pair in zip(labels, texts, strict=True)]
        shutil.rmtree(Path(writer.log_dir) / f"{step:05}" / MAP, ignore_errors=True)  # of an end that was cut short
        writer.add_embedding(mapped(embedded.features[:MAPPED]), texts, torch.cat(images), step, MAP, header)

    def _reading(self, workers: int) -> dict[str, int]:
        return {"resize": self.preprocess.resize, "batch_size": 256, "workers": workers}


def is_pictured(plan: Plan, step: int) -> bool:
    """Tells whether a look leaves pictures, by its step alone: a long run's disk would fill with those of all."""
    every = plan.knn_every_steps * -(-plan.total_steps // (plan.knn_every_steps * LOOKS))
    return step % every == 0 or step == plan.total_steps


def sheet_of_neighbours(images: Tensor) -> Tensor:
    """images: (N, 1 + k, C, H, W), an image and those nearest to it. Returns (3, H, W) in [0, 1]: a row a query,
    which stands apart from the rest."""
    lines = []
    for row in clean(images):
        query, *others = [cell(image) for image in row]
        lines.append(torch.cat([query, torch.ones_like(query)[:, :, : query.shape[2] // 4], *others], 2))
    return torch.cat(lines, 1)


def mapped(features: Tensor) -> Tensor:
    """(N, D) -> (N, at most MAP_DIM) float64: unit rows along their widest axes, rounded, since they are kept as text."""
    z = F.normalize(features, dim=1).double()
    if z.shape[1] > MAP_DIM:
        z = z - z.mean(0)
        z = z @ torch.linalg.eigh(z.T @ z).eigenvectors[:, -MAP_DIM:].flip(1)
    return z.round(decimals=4)


def thumbnails(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 3, THUMBNAIL, THUMBNAIL) float in [0, 1]."""
    size = (THUMBNAIL, THUMBNAIL)
    mode = "nearest" if images.shape[-1] <= THUMBNAIL else "area"
    return F.interpolate(visible(clean(images)), size, mode=mode).expand(-1, 3, -1, -1)


def _word(text: str) -> str:
    """Replaces what would take a text out of its cell of a table with tabs."""
    return " ".join(text.split())
