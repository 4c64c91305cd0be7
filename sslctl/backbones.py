"""Backbones behind one contract: images in [0, 1] go in, normalisation is the first operation, (B, D) comes out."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Backbone(nn.Module):
    """A feature network with its normalisation.

    network: maps normalised (B, C, H, W) to (B, embed_dim), has `embed_dim`; `feature_map` or `tokens` where it can.
    mean, std: one value a channel, of images in [0, 1]; saved with the weights.
    """

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network
        self.embed_dim: int = network.embed_dim
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> zero mean, unit variance over the dataset."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] -> (B, embed_dim)."""
        return self.network(self.normalize(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w), before pooling."""
        return self._inner("feature_map")(self.normalize(images))

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, D), all tokens of a transformer."""
        return self._inner("tokens")(self.normalize(images))

    def _inner(self, name: str):
        if not hasattr(self.network, name):
            raise TypeError(f"{type(self.network).__name__} has no {name}()")
        return getattr(self.network, name)


def describe(network: nn.Module) -> str:
    """What the plan says of a backbone: its stem, where it has a choice."""
    return getattr(network, "stem", "as the model defines it")


# --- torchvision's ResNets ---


class ResNet(nn.Module):
    """torchvision's ResNet under its own key names, without the classifier (He et al. 2016, arXiv:1512.03385).

    depth: 18, 34 or 50. stem: "imagenet" (7×7 stride 2, max-pool), "small" (3×3 stride 1, none) or "auto": small up to
    64 pixels, where the ImageNet stem would leave a map of 2×2 or less.
    """

    def __init__(self, depth: int, stem: str, zero_init_residual: bool, channels: int, image_size: int):
        super().__init__()
        import torchvision

        makers = {18: torchvision.models.resnet18, 34: torchvision.models.resnet34, 50: torchvision.models.resnet50}
        if depth not in makers:
            raise ValueError(f"backbone.depth={depth}: expected one of {sorted(makers)}")
        model = makers[depth](weights=None, zero_init_residual=zero_init_residual)
        if stem not in ("auto", "imagenet", "small"):
            raise ValueError(f"backbone.stem={stem}: expected auto, imagenet or small")
        small = stem == "small" or (stem == "auto" and image_size <= 64)
        self.stem = "3×3, no max-pool" if small else "7×7 stride 2, max-pool"
        self.embed_dim = model.fc.in_features
        if small:
            self.conv1 = _conv(channels, 64, 3, 1)
        elif channels != 3:
            self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        else:
            self.conv1 = model.conv1
        self.bn1 = model.bn1
        self.pool = nn.Identity() if small else model.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = model.layer1, model.layer2, model.layer3, model.layer4

    def feature_map(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, D, h, w)

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_map(x).mean(dim=(2, 3))  # (B, D)


# --- A residual net for small images on a CPU ---


def _conv(d_in: int, d_out: int, size: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(d_in, d_out, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class _Block(nn.Module):
    """The basic block of He et al. 2016, figure 2."""

    def __init__(self, d_in: int, d_out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(d_in, d_out, 3, stride), nn.BatchNorm2d(d_out)
        self.conv2, self.bn2 = _conv(d_out, d_out, 3, 1), nn.BatchNorm2d(d_out)
        same = stride == 1 and d_in == d_out
        self.shortcut = nn.Identity() if same else nn.Sequential(_conv(d_in, d_out, 1, stride), nn.BatchNorm2d(d_out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x), inplace=True)


class SmallResNet(nn.Module):
    """One or more basic blocks a stage, the first stage at `stem_stride`, each later one at half the size.

    widths: channels of each stage; the last is embed_dim. blocks: basic blocks a stage.
    stem_stride: 1, 2, 4 (2 and a max-pool), or 0 for auto: 2 from 16 pixels and 4 from 96 pixels on, where larger maps
    would take most of the time.
    """

    def __init__(self, widths: list[int], blocks: int, stem_stride: int, channels: int, image_size: int):
        super().__init__()
        stride = stem_stride or (4 if image_size >= 96 else 2 if image_size >= 16 else 1)
        if stride not in (1, 2, 4):
            raise ValueError(f"backbone.stem_stride={stem_stride}: expected 0 (auto), 1, 2 or 4")
        self.stem = f"3×3 stride {min(stride, 2)}, {'max-pool' if stride == 4 else 'no max-pool'}"
        self.pool = nn.MaxPool2d(3, 2, 1) if stride == 4 else nn.Identity()
        self.embed_dim = widths[-1]
        self.conv1, self.bn1 = _conv(channels, widths[0], 3, min(stride, 2)), nn.BatchNorm2d(widths[0])
        stages, d_in = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(_Block(d_in, width, 2 if stage and not block else 1))
                d_in = width
        self.layers = nn.Sequential(*stages)

    def feature_map(self, x: Tensor) -> Tensor:
        return self.layers(self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True)))  # (B, D, h, w)

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_map(x).mean(dim=(2, 3))  # (B, D)


# --- Others ---


class MLP(nn.Module):
    """Pixels through fully connected layers with BatchNorm and ReLU."""

    fixed_size = True

    def __init__(self, widths: list[int], channels: int, image_size: int):
        super().__init__()
        dims = [channels * image_size**2, *widths]
        layers = []
        for d_in, d_out in pairwise(dims):
            layers += [nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.embed_dim = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))  # (B, D)


class Timm(nn.Module):
    """Any timm model by name, without its classifier and without downloading weights."""

    def __init__(self, model: str, channels: int, image_size: int, kwargs: dict):
        super().__init__()
        import timm

        if not timm.is_model(model):
            import difflib

            near = difflib.get_close_matches(model, timm.list_models(), 3)
            raise ValueError(f"backbone.model={model} is not a timm model (nearest: {', '.join(near) or 'none'})")
        arguments = {"pretrained": False, "num_classes": 0, "in_chans": channels, **kwargs}
        try:  # transformers fix their position embedding to a size, which most can resample for crops of another
            sized = {"img_size": image_size, "dynamic_img_size": True, **arguments}
            self.model = timm.create_model(model, **sized)
        except TypeError:
            try:
                self.model = timm.create_model(model, img_size=image_size, **arguments)
                self.fixed_size = True
            except TypeError:  # convolutional models refuse the size
                self.model = timm.create_model(model, **arguments)
        self.embed_dim = (
            getattr(self.model, "head_hidden_size", None) or self.model.num_features
        )  # some widen after pooling

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # (B, D), pooled as the model does

    def feature_map(self, x: Tensor) -> Tensor:
        features = self.model.forward_features(x)
        if features.ndim != 4:
            raise TypeError(f"{type(self.model).__name__} gives tokens, not a feature map")
        return features  # (B, D, h, w)

    def tokens(self, x: Tensor) -> Tensor:
        features = self.model.forward_features(x)
        if features.ndim != 3:
            raise TypeError(f"{type(self.model).__name__} gives a feature map, not tokens")
        return features  # (B, L, D)
