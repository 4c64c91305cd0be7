"""A file's tensors made to fit a network of other channels, image size or patches; each change is said."""

import math

from torch import Tensor, nn

from sslctl.models.backbones import Backbone
from sslctl.models.matching import bare
from sslctl.ops.image_size import ImageSize, height_width


def adapt(
    tensors: dict[str, Tensor], backbone: Backbone, *, resample_patches: bool, trained_at: ImageSize | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors with those changed that can be, and a sentence for each.

    First layer: its channels are summed for grey images, otherwise repeated and scaled (timm). Positions of patches: resampled,
    bicubic and antialiased; trained_at: the size of the images that they are of, which tells their grid where it is no square.
    resample_patches: also the patches' weights, by FlexiViT's pseudo-inverse (arXiv:2212.08013, eq. 4).
    """
    ours, adapted, sentences = backbone.state_dict(), dict(tensors), []
    first = next((name for name, part in backbone.named_modules() if isinstance(part, nn.Conv2d)), None)
    for name, tensor in tensors.items():
        expected = ours[name].shape
        if name == f"{first}.weight" and tensor.ndim == 4 and tensor.is_floating_point():
            if tensor.shape[1] != expected[1] and tensor.numel():
                tensor, words = _with_channels(tensor, expected)
                sentences.append(words)
            if resample_patches and bare(name) == "patch_embed.proj.weight" and tensor.shape[2:] != expected[2:]:
                from timm.layers import resample_patch_embed

                size = "×".join(map(str, tensor.shape[2:]))
                tensor = resample_patch_embed(tensor, list(expected[2:]))
                sentences.append(f"patches of {size} pixels resampled to {'×'.join(map(str, expected[2:]))}")
        elif bare(name) == "pos_embed" and tensor.ndim == 3 == len(expected):
            tensor, words = _with_positions(tensor, backbone.network.model, trained_at)
            sentences += words
        adapted[name] = tensor
    return adapted, sentences


def _with_channels(weight: Tensor, expected: tuple[int, ...]) -> tuple[Tensor, str]:
    """(D, C, h, w) -> (D, expected[1], h, w)."""
    from timm.models import adapt_input_conv

    theirs, channels = weight.shape[1], expected[1]
    verb = "summed" if channels == 1 else "repeated" if channels > theirs else "cut"
    adapted = adapt_input_conv(channels, weight, base_chans=theirs)
    return adapted, f"{theirs} channels of the first layer {verb} for {channels}"


def _with_positions(positions: Tensor, model: nn.Module, trained_at: ImageSize | None) -> tuple[Tensor, list[str]]:
    """(1, P + L, D) of another grid -> that of the model; unchanged where there is none, or theirs is not known."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or positions.shape[-1] != model.pos_embed.shape[-1]:
        return positions, []
    prefix = model.pos_embed.shape[1] - grid[0] * grid[1]
    theirs = _grid_of(positions.shape[1] - prefix, trained_at)
    if theirs is None or theirs == tuple(grid):
        return positions, []
    from timm.layers import resample_abs_pos_embed

    sentence = f"positions of {theirs[0]}×{theirs[1]} patches resampled to {grid[0]}×{grid[1]}"
    return resample_abs_pos_embed(positions, list(grid), list(theirs), num_prefix_tokens=prefix), [sentence]


def _grid_of(patches: int, trained_at: ImageSize | None) -> tuple[int, int] | None:
    """Returns (rows, columns) of so many patches: in the shape of the images, square ones where nothing is known of them."""
    height, width = height_width(trained_at or 1)
    rows = math.isqrt(max(patches * height // width, 0))
    return (rows, patches // rows) if rows and rows * width * rows == patches * height else None
