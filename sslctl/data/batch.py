"""What one training step receives."""

from dataclasses import dataclass, field

from torch import Tensor

from sslctl.views import Key


@dataclass(frozen=True)
class Batch:
    """One step's images, on the device."""

    views: dict[str, Tensor]  # group -> (V, B, C, h, w) float in [0, 1]
    label: Tensor  # (B,) int64, -1 where unknown
    index: Tensor  # (B,) int64, the images' positions in the dataset
    key: Key  # the step's random numbers
    targets: dict = field(default_factory=dict)
