"""Backbones behind one contract: images in [0, 1] go in, normalisation is the first operation, (B, D) comes out."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslctl.models import vit
from sslctl.models.convolutions import Block, convolution, norm_layer
from sslctl.models.network import Network
from sslctl.ops.color_space import lightness
from sslctl.ops.image_size import ImageSize, height_width, in_words, shorter_side


class Backbone(nn.Module):
    """A feature network with its normalisation.

    network: maps normalised (B, C, H, W) to (B, embed_dim); what else it may have is in `sslctl.models.network`.
    mean, std: one value a channel, of images in [0, 1]; saved with the weights. None for token ids, which go in as they are.
    sees_lightness: a method may set it; colour images are then seen without their colours (sslctl.ops.color_space).
    pretrained: names of the tensors that came from a file, which no method initialises again.
    frozen_modules: names of the network's parts that stay in eval mode, see `sslctl.models.freezing`.
    """

    sees_lightness = False
    pretrained: frozenset[str] = frozenset()
    frozen_modules: tuple[str, ...] = ()

    def __init__(self, network: Network, mean: list[float] | None = None, std: list[float] | None = None):
        super().__init__()
        self.network = network
        self.embed_dim: int = network.embed_dim
        self.normalized = mean is not None
        if mean is None:
            return
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for name in self.frozen_modules:
            self.network.get_submodule(name).eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> zero mean, unit variance over the dataset."""
        images = lightness(images) if self.sees_lightness else images
        return (images - self.mean) / self.std if self.normalized else images

    def denormalize(self, x: Tensor) -> Tensor:
        """Undoes `normalize`."""
        return x * self.std + self.mean

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] -> (B, embed_dim)."""
        return self.network(self.normalize(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w), before pooling. Raises ValueError where the network has none."""
        if not hasattr(self.network, "feature_map"):
            raise ValueError(f"{type(self.network).__name__} has no feature map: take a convolutional backbone")
        return self.network.feature_map(self.normalize(images))

    def with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, embed_dim) as `forward` gives it, and the features (B, D, h, w) that it is made of: of places of a
        convolutional network, of a vision transformer's patches. Raises ValueError where the network has none."""
        if not hasattr(self.network, "with_map"):
            raise ValueError(f"{type(self.network).__name__} has no features of places")
        return self.network.with_map(self.normalize(images))

    def tokens(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) -> (B, P + L, D), the tokens of a vision transformer, its P prefix tokens first.

        mask: (B, L) bool, True where mask_token (1, D) takes a patch's place. keep: (B, K) or (K,), the patches that go in.
        """
        return vit.tokens(self.vision_transformer(), self.normalize(images), mask, mask_token, keep)

    def vision_transformer(self) -> nn.Module:
        """Returns timm's VisionTransformer or Eva inside. Raises ValueError where the network is none."""
        return vit.require_vit(self.network)


def describe(network: Network) -> str:
    """Returns what the plan says of a network's beginning, where it has a choice: its stem, or its patches."""
    patch = vit.patch_size_of(network)
    patches = f"patches of {patch} px (backbone.kwargs.patch_size)" if patch > 1 else "as the model defines it"
    return getattr(network, "stem", patches)


# --- torchvision's ResNets ---


class ResNet(nn.Module):
    """torchvision's ResNet under its own key names, without the classifier (He et al. 2016, arXiv:1512.03385).

    depth: 18, 34, 50 or 101. stem: "imagenet" (7×7 stride 2, max-pool), "small" (3×3 stride 1, none) or "auto": small up to
    64 pixels, where the ImageNet stem would leave a map of 2×2 or less. norm: see `norm_layer`.
    """

    def __init__(
        self, depth: int, stem: str, zero_init_residual: bool, norm: str, channels: int, image_size: ImageSize
    ):
        super().__init__()
        import torchvision

        make_norm = norm_layer(norm)

        if depth not in (18, 34, 50, 101):
            raise ValueError(f"backbone.depth={depth}: expected one of [18, 34, 50, 101]")
        make = getattr(torchvision.models, f"resnet{depth}")
        model = make(weights=None, zero_init_residual=zero_init_residual, norm_layer=make_norm)
        if stem not in ("auto", "imagenet", "small"):
            raise ValueError(f"backbone.stem={stem}: expected auto, imagenet or small")
        small = stem == "small" or (stem == "auto" and shorter_side(image_size) <= 64)
        self.stem = "3×3, no max-pool" if small else "7×7 stride 2, max-pool"
        self.depth, self.embed_dim = depth, model.fc.in_features
        if small:
            self.conv1 = convolution(channels, 64, 3, 1)
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

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.feature_map(x)
        return h.mean(dim=(2, 3)), h  # (B, D), (B, D, h, w)

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_map(x).mean(dim=(2, 3))  # (B, D)

    def layer_names(self) -> list[tuple[str, ...]]:
        stages = {f"layer{n}": getattr(self, f"layer{n}") for n in range(1, 5)}
        return [("conv1", "bn1"), *((f"{stage}.{block}",) for stage, of in stages.items() for block in range(len(of)))]


# --- A residual net for small images on a CPU ---


class SmallResNet(nn.Module):
    """One or more basic blocks a stage, the first stage at `stem_stride`, each later one at half the size.

    widths: channels of each stage; the last is embed_dim. blocks: basic blocks a stage.
    stem_stride: 1, 2, 4 (2 and a max-pool), or 0 for auto: 2 from 16 pixels and 4 from 96 pixels on, where larger maps
    would take most of the time. norm: see `norm_layer`.
    """

    def __init__(
        self, widths: list[int], blocks: int, stem_stride: int, norm: str, channels: int, image_size: ImageSize
    ):
        super().__init__()
        make_norm, side = norm_layer(norm), shorter_side(image_size)
        stride = stem_stride or (4 if side >= 96 else 2 if side >= 16 else 1)
        if stride not in (1, 2, 4):
            raise ValueError(f"backbone.stem_stride={stem_stride}: expected 0 (auto), 1, 2 or 4")
        self.stem = f"3×3 stride {min(stride, 2)}, {'max-pool' if stride == 4 else 'no max-pool'}"
        self.pool = nn.MaxPool2d(3, 2, 1) if stride == 4 else nn.Identity()
        self.embed_dim = widths[-1]
        self.conv1, self.bn1 = convolution(channels, widths[0], 3, min(stride, 2)), make_norm(widths[0])
        stages, d_in = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(Block(d_in, width, 2 if stage and not block else 1, make_norm))
                d_in = width
        self.layers = nn.Sequential(*stages)

    def feature_map(self, x: Tensor) -> Tensor:
        return self.layers(self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True)))  # (B, D, h, w)

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.feature_map(x)
        return h.mean(dim=(2, 3)), h  # (B, D), (B, D, h, w)

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_map(x).mean(dim=(2, 3))  # (B, D)

    def layer_names(self) -> list[tuple[str, ...]]:
        return [("conv1", "bn1"), *((f"layers.{block}",) for block in range(len(self.layers)))]


# --- Others ---


class MLP(nn.Module):
    """Pixels through fully connected layers with BatchNorm and ReLU."""

    fixed_size = True

    def __init__(self, widths: list[int], channels: int, image_size: ImageSize):
        super().__init__()
        dims = [channels * math.prod(height_width(image_size)), *widths]
        layers = []
        for d_in, d_out in pairwise(dims):
            layers += [nn.Linear(d_in, d_out, bias=False), nn.BatchNorm1d(d_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.embed_dim = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))  # (B, D)

    def layer_names(self) -> list[tuple[str, ...]]:
        return [(f"layers.{i}", f"layers.{i + 1}") for i in range(0, len(self.layers), 3)]  # Linear and BatchNorm1d


# Arguments of timm.create_model that read or download files.
_LOADS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


class Timm(nn.Module):
    """Any timm model by name, without its classifier and without downloading weights."""

    def __init__(self, model: str, channels: int, image_size: ImageSize, kwargs: dict):
        super().__init__()
        import timm

        if not timm.is_model(model):
            import difflib

            near = difflib.get_close_matches(model, timm.list_models(), 3)
            raise ValueError(f"backbone.model={model} is not a timm model (nearest: {', '.join(near) or 'none'})")
        for key in kwargs:
            if not key.isidentifier():
                raise ValueError(f"backbone.kwargs.{key}: expected the name of an argument of a timm model")
            if key in _LOADS:
                raise ValueError(f"backbone.kwargs.{key}: weights come from backbone.weights=FILE alone")
        own = {"pretrained": False, "num_classes": 0, "in_chans": channels, **kwargs}
        # Transformers fix their position embedding to a size, which most can resample for crops of another; convolutional
        # models refuse the size.
        for sized in ({"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}, {}):
            try:
                self.arguments = {**sized, **own}  # of timm.create_model, which make this model again
                self.model = timm.create_model(model, **self.arguments)
                break
            except TypeError:
                if not sized:
                    raise
        self.model_name, self.fixed_size = model, "img_size" in sized and "dynamic_img_size" not in sized
        if self.fixed_size and self.arguments["img_size"] != image_size:
            raise ValueError(
                f"{model} takes the images' own size only, {in_words(image_size)}: leave kwargs.img_size out"
            )
        patch = vit.patch_size_of(self)
        if any(side % patch for side in height_width(image_size)):
            raise ValueError(
                f"patches of {patch} pixels do not divide images of {in_words(image_size)} (+backbone.kwargs.patch_size=…)"
            )
        self.embed_dim = (
            getattr(self.model, "head_hidden_size", None) or self.model.num_features
        )  # some widen at the end

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # (B, D), pooled as the model does

    def feature_map(self, x: Tensor) -> Tensor:
        features = self.model.forward_features(x)
        if features.ndim != 4:
            raise ValueError(
                f"{type(self.model).__name__} gives tokens, not a feature map: take a convolutional backbone"
            )
        return features  # (B, D, h, w)

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.forward_features(x)
        pooled = self.model.forward_head(features)  # (B, D), as `forward` does
        if features.ndim == 4:
            last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"  # of Swin
            return pooled, features.permute(0, 3, 1, 2) if last else features
        patches = features[:, vit.require_vit(self).num_prefix_tokens :]  # (B, L, D)
        return pooled, patches.transpose(1, 2).unflatten(2, vit.grid_of(self.model, x))

    def layer_names(self) -> list[tuple[str, ...]]:
        """Returns timm's own division into blocks; final norms go with the classifier (MAE's official code, lr_decay.py).

        Empty for the few models of which timm gives none.
        """
        from timm.models import group_parameters

        if not hasattr(self.model, "group_matcher"):
            return []
        groups = group_parameters(self.model, self.model.group_matcher(coarse=False))
        inner = (
            [name for name in names if not name.startswith(("norm.", "fc_norm.", "head."))] for names in groups.values()
        )
        return [tuple(f"model.{name}" for name in names) for names in inner if names]
