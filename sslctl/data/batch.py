"""What one training step receives."""

from dataclasses import dataclass, field

from torch import Tensor

from sslctl.views import Key


@dataclass(frozen=True)
class Batch:
    """One step's images, on the device."""

    views: dict[str, Tensor]  # group -> (V, B, C, h, w) in [0, 1]; frames: (1, B, T, C, h, w); tokens: (1, B, L) int64
    label: Tensor  # (B,) int64, -1 where unknown; (B, C) bool where an image may have several
    index: Tensor  # (B,) int64, the images' positions in the dataset
    key: Key  # the step's random numbers
    targets: dict = field(default_factory=dict)
    host_index: Tensor | None = None  # `index` once more, on the CPU; None where it is there anyway

    @property
    def host_key(self) -> Key:
        """The step's random numbers on the CPU: for what decides the shape of a tensor, which a GPU would be waited for."""
        return self.key.of(self.index.cpu() if self.host_index is None else self.host_index)

    def split(self, parts: int) -> list["Batch"]:
        """Returns so many equal parts of the images, in order; each image keeps its views and its random numbers."""
        if parts == 1:
            return [self]
        size = len(self.index) // parts
        rows = [slice(start, start + size) for start in range(0, size * parts, size)]
        return [
            Batch(
                {group: views[:, part] for group, views in self.views.items()},
                self.label[part],
                self.index[part],
                self.key.select(part),
                {name: target[part] for name, target in self.targets.items()},
                None if self.host_index is None else self.host_index[part],
            )
            for part in rows
        ]
