"""A frozen teacher: the network that SEED, CompRess and distillation of features imitate."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslctl.errors import InputError, first_line
from sslctl.models.preprocess import Preprocess
from sslctl.ops.image_size import ImageSize, height_width, in_words


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
        return self._network_on(images.device)(images).float()

    @torch.no_grad()
    def with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) in [0, 1] -> (B, embed_dim) and (B, D, h, w), float32, see `Backbone.with_map`."""
        pooled, places = self._network_on(images.device).with_map(images)
        return pooled.float(), places.float()

    def _network_on(self, device: torch.device) -> nn.Module:
        if self.network.mean.device != device:
            self.network.to(device)
        return self.network

    def refuse_size(self, size: ImageSize, where: str | None) -> None:
        """Raises InputError where the network cannot take images of a size. where: it is from; None for timm's own."""
        try:
            self(torch.zeros(1, self.preprocess.channels, *height_width(size)))
        except (RuntimeError, AssertionError, ValueError) as error:
            own = self.preprocess.image_size
            trained_on = f", its own images had {in_words(own)}" if own != size else ""
            named = f"method.teacher={where}" if where else "method.teacher_backbone"
            views = f"views of {in_words(size)} pixels{trained_on}"
            raise InputError(f"{named} cannot take {views}: {first_line(error)}") from error
