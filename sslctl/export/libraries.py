"""torchvision's and timm's files: weights under their names, the normalisation outside."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sslctl.data.modality import TEXTS
from sslctl.errors import InputError
from sslctl.export.format import FILE, Lines, Loaded, Network, arguments, literal
from sslctl.models.backbones import Backbone, ResNet, Timm

# --- torchvision ---


def torchvision_lines(network: Network) -> Lines:
    resnet = own_backbone(network, "torchvision").network
    if not isinstance(resnet, ResNet):
        near = "timm" if isinstance(resnet, Timm) else "onnx"
        raise InputError(
            f"format=torchvision takes resnet18, resnet34, resnet50 and resnet101, this backbone is a {_kind(resnet)}:"
            f" format={near}",
            advice=[f"format={near}"],
        )
    layer = "norm_layer=functools.partial(torch.nn.GroupNorm, 1)" if _norm_of(resnet) else ""
    return _with_normalization(
        network,
        [
            *(["import functools", ""] if layer else []),
            "import torch",
            "import torchvision",
            "",
            f"model = torchvision.models.resnet{resnet.depth}({layer})",
            *_stem_lines(resnet),
            "model.fc = torch.nn.Identity()  # the file has no classifier: the model gives features",
            f"model.load_state_dict(torch.load({FILE}, weights_only=True))",
            "model.eval()",
        ],
    )


def write_torchvision(network: Network, path: Path) -> None:
    """Writes a state_dict, of which torchvision's own model misses nothing but its classifier."""
    resnet, tensors = network.backbone.network, own_tensors(network)
    names, classifier = _torchvision_model(resnet).state_dict().keys(), {"fc.weight", "fc.bias"}
    if names - tensors.keys() != classifier or tensors.keys() - names:
        raise RuntimeError(f"torchvision's resnet{resnet.depth} has other names than this backbone")
    torch.save(tensors, path)


def load_torchvision(network: Network, path: Path) -> Loaded:
    resnet = network.backbone.network
    model = _torchvision_model(resnet)
    _set_stem(model, resnet)
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(path, weights_only=True))
    return _normalized(network, model)


def _torchvision_model(resnet: ResNet) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, f"resnet{resnet.depth}")(norm_layer=_norm_of(resnet))


# --- timm ---


def timm_lines(network: Network) -> Lines:
    name, settings = _timm_call(network)
    inner = network.backbone.network
    return _with_normalization(
        network,
        [
            "import timm",
            "import torch",
            "",
            f"model = timm.create_model({arguments(name, **settings)})",
            *(_stem_lines(inner, timm=True) if isinstance(inner, ResNet) else []),
            f"timm.models.load_checkpoint(model, {FILE}, strict=True)",
            "model.eval()",
        ],
    )


def write_timm(network: Network, path: Path) -> None:
    save_file(own_tensors(network), path, metadata={"format": "pt"})


def load_timm(network: Network, path: Path) -> Loaded:
    import timm

    name, settings = _timm_call(network)
    model, inner = timm.create_model(name, **settings), network.backbone.network
    if isinstance(inner, ResNet):
        _set_stem(model, inner, timm=True)
    timm.models.load_checkpoint(model, str(path), strict=True)
    return _normalized(network, model)


def _timm_call(network: Network) -> tuple[str, dict[str, Any]]:
    """Returns what timm.create_model is given. Raises InputError for a network that is none of timm's."""
    inner = own_backbone(network, "timm").network
    if isinstance(inner, ResNet):
        norm = {"norm_layer": "groupnorm1"} if _norm_of(inner) else {}
        return f"resnet{inner.depth}", {"num_classes": 0, "in_chans": inner.conv1.in_channels, **norm}
    if not isinstance(inner, Timm):
        raise InputError(
            f"format=timm takes backbone=timm, small_vit and resnets, this backbone is a {_kind(inner)}: format=onnx",
            advice=["format=onnx"],
        )
    if not re.fullmatch(r"\w+(\.\w+)?", inner.model_name):
        raise InputError(f"backbone.model={inner.model_name!r}: expected the name of a timm model")
    return inner.model_name, inner.arguments | network.pool


# --- What both have in common ---


def own_tensors(network: Network) -> dict[str, Tensor]:
    """Returns the weights under torchvision's or timm's names."""
    inner = network.backbone.network
    return contiguous(inner.model if isinstance(inner, Timm) else inner)


def contiguous(module: nn.Module) -> dict[str, Tensor]:
    """Returns copies of a module's tensors, as files want them."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in module.state_dict().items()}


def _norm_of(resnet: ResNet) -> Callable[[int], nn.Module] | None:
    return functools.partial(nn.GroupNorm, 1) if isinstance(resnet.bn1, nn.GroupNorm) else None


def _stem(resnet: ResNet, timm: bool) -> tuple[tuple[int, int, int] | None, dict[str, Any]]:
    """Returns a first convolution's arguments, (C, 64, side) and those with names; None where it is the library's own."""
    conv = resnet.conv1
    if not (_is_small(resnet) or (conv.in_channels != 3 and not timm)):
        return None, {}
    return (conv.in_channels, 64, conv.kernel_size[0]), {
        "stride": conv.stride[0],
        "padding": conv.padding[0],
        "bias": False,
    }


def _is_small(resnet: ResNet) -> bool:
    return isinstance(resnet.pool, nn.Identity)


def _stem_lines(resnet: ResNet, timm: bool = False) -> list[str]:
    """Returns the lines that make the first layers of torchvision's or timm's model, which are ImageNet's, the backbone's."""
    shape, settings = _stem(resnet, timm)
    lines = [f"model.conv1 = torch.nn.Conv2d({arguments(*shape, **settings)})"] if shape else []
    if _is_small(resnet):
        lines[-1] += "  # the stem for small images, which has no max-pool"
        lines.append("model.maxpool = torch.nn.Identity()")
    return lines


def _set_stem(model: nn.Module, resnet: ResNet, timm: bool = False) -> None:
    """Does what `_stem_lines` says."""
    shape, settings = _stem(resnet, timm)
    if shape:
        model.conv1 = nn.Conv2d(*shape, **settings)
    if _is_small(resnet):
        model.maxpool = nn.Identity()


def _normalization(network: Network) -> tuple[list[float], list[float]]:
    """Returns mean and std, a value a channel, in as few digits as give the same float32 again."""
    buffers = (network.backbone.mean, network.backbone.std)
    return tuple([float(str(np.float32(v))) for v in t.flatten().tolist()] for t in buffers)


def _with_normalization(network: Network, load: list[str]) -> Lines:
    """Adds the normalisation to lines that load a bare model."""
    mean, std = map(literal, _normalization(network))
    values = f"mean, std = torch.tensor({mean}).view(-1, 1, 1), torch.tensor({std}).view(-1, 1, 1)"
    return Lines([*load, values], "features = model((images - mean) / std)")


def _normalized(network: Network, model: nn.Module) -> Loaded:
    """Does what `_with_normalization` says."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in _normalization(network))
    model.eval()
    return Loaded(model, lambda images: model((images - mean) / std))


def own_backbone(network: Network, name: str) -> Backbone:
    """Returns the backbone whose weights alone make the features. Raises InputError where there is none."""
    if network.preprocess.modality == TEXTS:
        raise InputError(
            f"format={name} has no networks for texts: format=safetensors, onnx or torch_export",
            advice=["format=safetensors"],
        )
    if network.backbone is not None and network.backbone.sees_lightness:
        raise InputError(
            f"format={name} has no place for the step from colours to lightness: format=safetensors, onnx or torch_export",
            advice=["format=safetensors"],
        )
    if network.backbone is None:
        raise InputError(
            f"format={name} holds a backbone's weights, and features={network.features} of this method is not a backbone's"
            " own output: format=onnx or torch_export, or other features=",
            advice=["format=torch_export"],
        )
    return network.backbone


def _kind(inner: nn.Module) -> str:
    return f"timm {inner.model_name}" if isinstance(inner, Timm) else type(inner).__name__
