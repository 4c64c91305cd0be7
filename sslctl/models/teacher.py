"""A frozen teacher: the network that SEED and CompRess imitate."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslctl.errors import InputError, first_line
from sslctl.models.preprocess import Preprocess


@dataclass
class Teacher:
    """A network in eval mode without gradient. No module on purpose: no state of the run's, saved once and not with it."""

    network: nn.Module
    node: dict  # the configuration of its backbone
    preprocess: Preprocess

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @property
    def embed_dim(self) -> int:
        return self.network.embed_dim

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, embed_dim) float32."""
        if self.network.mean.device != images.device:
            self.network.to(images.device)
        return self.network(images).float()

    def refuse_size(self, size: int, where: str) -> None:
        """Raises InputError where the network cannot take square images of a size. where: it is from."""
        try:
            self(torch.zeros(1, self.preprocess.channels, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            own = self.preprocess.image_size
            trained_on = f", its own images had {own}" if own != size else ""
            raise InputError(
                f"method.teacher={where} cannot take views of {size} pixels{trained_on}: {first_line(error)}"
            ) from error
