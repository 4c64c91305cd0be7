"""A finished run's backbone in Python: `backbone, preprocess = sslctl.load("runs/latest")`."""

from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from sslctl.backbones import Backbone
from sslctl.build import Preprocess, build_backbone
from sslctl.checkpoint import CheckpointError, compare, load_tensors
from sslctl.config import InputError, user_path
from sslctl.run_directory import BACKBONE, PREPROCESS, is_run, read_config, read_json
from sslctl.views.maker import resize_and_crop


class Transform:
    """One image to the backbone's input."""

    def __init__(self, settings: Preprocess):
        self.settings = settings

    def __call__(self, image: Image.Image | np.ndarray | Tensor) -> Tensor:
        """A PIL image, (H, W, C) uint8 array or (C, H, W) uint8 tensor -> (C, S, S) float in [0, 1]."""
        if isinstance(image, Image.Image):
            image = np.asarray(image.convert("L" if self.settings.channels == 1 else "RGB"))
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image.copy())
            image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != self.settings.channels:
            raise InputError(
                f"expected ({self.settings.channels}, H, W) uint8, found {tuple(image.shape)} {image.dtype}"
            )
        return resize_and_crop(image, self.settings.image_size, self.settings.resize).float() / 255


def load(run: str | Path) -> tuple[Backbone, Transform]:
    """The backbone of a finished run in eval mode, and the transform of its input.

    The backbone maps (B, C, S, S) floats in [0, 1] to (B, embed_dim); normalisation is inside. Raises InputError when
    the directory is no finished run or any tensor does not match.
    """
    path = user_path(run)
    if not is_run(path):
        raise InputError(f"{path} is not a run directory")
    if not (path / BACKBONE).exists():
        raise InputError(f"{path} is not finished: it has no {BACKBONE}")
    settings = Preprocess(**read_json(path / PREPROCESS))
    backbone = build_backbone(OmegaConf.create(read_config(path)["backbone"]), settings, with_weights=False)
    tensors = load_tensors(path / BACKBONE)
    differences = compare(tensors, backbone.state_dict())
    if differences:
        raise CheckpointError(f"{path / BACKBONE} does not fit its own configuration:", *differences)
    backbone.load_state_dict(tensors, strict=True)
    return backbone.eval(), Transform(settings)
