"""The check of an exported file: loaded again by its own loader, its features compared on real images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sslctl.data.loader import clean_batches
from sslctl.evaluation.named_networks import NamedNetwork
from sslctl.export.format import Format, Network
from sslctl.factory.exportable import find_backbone
from sslctl.methods.base import Method
from sslctl.views.maker import clean


class ParityError(RuntimeError):
    """A file whose features are not the run's. It is not kept."""


@dataclass(frozen=True)
class Parity:
    """How far a file's features are from the run's. scale: the largest feature; where: the images that were compared.

    tensors: how many weights are the same to the bit, of formats that keep their names.
    """

    difference: float
    scale: float
    where: str
    tensors: int | None

    def describe(self) -> str:
        same = "" if self.tensors is None else f"; all {self.tensors} tensors equal"
        return f"largest difference {self.difference:.2g} of features up to {self.scale:.3g}, on {self.where}{same}"


# --- What is exported ---


class _Computed(nn.Module):
    """One of a method's features."""

    def __init__(self, method: Method, features: str):
        super().__init__()
        self.method, self.chosen = method, features

    def forward(self, images: Tensor) -> Tensor:
        return self.method.features(images)[self.chosen]


def network_of(one: NamedNetwork) -> Network:
    """Returns the network behind a subject's features: a backbone where they are its own output, else all of the method."""
    subject, preprocess = one.subject, one.subject.preprocess
    backbone, pool = subject.backbone, {}
    if subject.method is not None:
        backbone, pool = find_backbone(subject.method, subject.features, preprocess) or (None, {})
    module = backbone or _Computed(subject.method, subject.features).eval()
    return Network(module, backbone, pool, one.node, preprocess, subject.features, subject.width())


# --- The check ---


@torch.no_grad()
def compared(one: NamedNetwork, kind: Format, network: Network, file: Path, count: int) -> Parity:
    """Compares the features of real images by the run with those by a file, which its own library loads.

    Raises ParityError for features of another shape, and for weights that are not the network's.
    """
    source, loaded = one.source, kind.load(network, file)
    tensors = kind.tensors and kind.tensors(network)
    if tensors is not None:
        read = loaded.model.state_dict()
        other = [name for name in read.keys() | tensors.keys() if not _same(read.get(name), tensors.get(name))]
        if other:
            raise ParityError(
                f"{file.name} is not written: loaded by {kind.loader}, {len(other)} of its {len(tensors)} tensors are not the"
                f" run's (first: {min(other)})"
            )
    rows = torch.arange(0, len(source), max(1, len(source) // count))[:count]
    difference, scale = 0.0, 0.0
    for part in filter(len, (rows[:1], rows[1:3], *rows[3:].split(32))):  # any number of images goes in
        settings = {"resize": network.preprocess.resize, "batch_size": 32, "workers": 0}
        for images in clean_batches(source, part, **settings):
            images = clean(images) if images.dtype == torch.uint8 else images
            ours, theirs = one.subject.function(images).float(), loaded.features(images).float()
            if theirs.shape != ours.shape:
                raise ParityError(f"{file.name} gives features {tuple(theirs.shape)}, the run {tuple(ours.shape)}")
            worst = float((theirs - ours).abs().max())
            difference = worst if worst != worst else max(difference, worst)
            scale = max(scale, float(ours.abs().max()))
    where = f"{len(rows)} {network.preprocess.modality.plural} of {source.name} ({source.split})"
    return Parity(difference, scale, where, None if tensors is None else len(tensors))


def _same(loaded: Tensor | None, expected: Tensor | None) -> bool:
    return loaded is not None and expected is not None and torch.equal(loaded, expected)
