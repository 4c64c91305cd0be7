"""The files that `sslctl export` writes: for each format, whether it takes a network, the writing, the lines that load it."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sslctl.data.modality import TEXTS
from sslctl.errors import InputError
from sslctl.export.format import FILE, Format, Lines, Network
from sslctl.factory.backbone_file import save_backbone
from sslctl.factory.exportable import with_pooling
from sslctl.factory.from_config import build_backbone
from sslctl.models.backbones import Backbone, ResNet, Timm
from sslctl.runs.checkpoint import compare

# --- torchvision and timm: weights under their names, the normalisation outside ---


def _torchvision_lines(network: Network) -> Lines:
    resnet = _own(network, "torchvision").network
    if not isinstance(resnet, ResNet):
        near = "timm" if isinstance(resnet, Timm) else "onnx"
        raise InputError(
            f"format=torchvision takes resnet18, resnet34 and resnet50, this backbone is a {_kind(resnet)}: format={near}"
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


def _write_torchvision(network: Network, path: Path) -> None:
    """Writes a state_dict, of which torchvision's own model misses nothing but its classifier."""
    import torchvision

    resnet, tensors = network.backbone.network, _own_tensors(network)
    model = getattr(torchvision.models, f"resnet{resnet.depth}")(norm_layer=_norm_of(resnet))
    names, classifier = model.state_dict().keys(), {"fc.weight", "fc.bias"}
    if names - tensors.keys() != classifier or tensors.keys() - names:
        raise RuntimeError(f"torchvision's resnet{resnet.depth} has other names than this backbone")
    torch.save(tensors, path)


def _timm_lines(network: Network) -> Lines:
    inner = _own(network, "timm").network
    if isinstance(inner, Timm):
        arguments = inner.arguments | network.pool
        call = ", ".join([repr(inner.model_name), *(f"{key}={value!r}" for key, value in arguments.items())])
        after = []
    elif isinstance(inner, ResNet):
        layer = ", norm_layer='groupnorm1'" if _norm_of(inner) else ""
        call = f"'resnet{inner.depth}', num_classes=0, in_chans={inner.conv1.in_channels}{layer}"
        after = _stem_lines(inner, timm=True)
    else:
        raise InputError(
            f"format=timm takes backbone=timm, small_vit and resnets, this backbone is a {_kind(inner)}: format=onnx"
        )
    return _with_normalization(
        network,
        [
            "import timm",
            "import torch",
            "",
            f"model = timm.create_model({call})",
            *after,
            f"timm.models.load_checkpoint(model, {FILE}, strict=True)",
            "model.eval()",
        ],
    )


def _write_timm(network: Network, path: Path) -> None:
    save_file(_own_tensors(network), path, metadata={"format": "pt"})


def _own_tensors(network: Network) -> dict[str, Tensor]:
    """Returns the weights under torchvision's or timm's names."""
    inner = network.backbone.network
    return _contiguous(inner.model if isinstance(inner, Timm) else inner)


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in module.state_dict().items()}


def _norm_of(resnet: ResNet) -> Callable[[int], nn.Module] | None:
    return (lambda width: nn.GroupNorm(1, width)) if isinstance(resnet.bn1, nn.GroupNorm) else None


def _stem_lines(resnet: ResNet, timm: bool = False) -> list[str]:
    """Returns the lines that make the first layers of torchvision's or timm's model, which are ImageNet's, the backbone's."""
    conv, lines = resnet.conv1, []
    small = isinstance(resnet.pool, nn.Identity)
    if small or (conv.in_channels != 3 and not timm):
        shape = f"{conv.in_channels}, 64, {conv.kernel_size[0]}, stride={conv.stride[0]}, padding={conv.padding[0]}"
        lines.append(f"model.conv1 = torch.nn.Conv2d({shape}, bias=False)")
    if small:
        lines[-1] += "  # the stem for small images, which has no max-pool"
        lines.append("model.maxpool = torch.nn.Identity()")
    return lines


def _with_normalization(network: Network, load: list[str]) -> Lines:
    """Adds the normalisation to lines that load a bare model."""
    backbone = network.backbone
    mean, std = ([float(str(np.float32(v))) for v in t.flatten().tolist()] for t in (backbone.mean, backbone.std))
    values = f"mean, std = torch.tensor({mean}).view(-1, 1, 1), torch.tensor({std}).view(-1, 1, 1)"
    return Lines([*load, values], "features = model((images - mean) / std)")


def _own(network: Network, name: str) -> Backbone:
    """Returns the backbone whose weights alone make the features. Raises InputError where there is none."""
    if network.preprocess.modality == TEXTS:
        raise InputError(f"format={name} has no networks for texts: format=safetensors, onnx or torch_export")
    if network.backbone is not None and network.backbone.sees_lightness:
        raise InputError(
            f"format={name} has no place for the step from colours to lightness: format=safetensors, onnx or torch_export"
        )
    if network.backbone is None:
        raise InputError(
            f"format={name} holds a backbone's weights, and features={network.features} of this method is not a backbone's"
            " own output: format=onnx or torch_export, or other features="
        )
    return network.backbone


def _kind(inner: nn.Module) -> str:
    return f"timm {inner.model_name}" if isinstance(inner, Timm) else type(inner).__name__


# --- safetensors: sslctl's own names, with all it takes to build the backbone again ---


def _safetensors_lines(network: Network) -> Lines:
    if network.backbone is None:
        raise InputError(
            f"format=safetensors holds a backbone's weights, and features={network.features} of this method is not a"
            " backbone's own output: format=onnx or torch_export, or other features="
        )
    again = build_backbone(with_pooling(network.node, network.pool), network.preprocess, with_weights=False)
    if compare(network.backbone.state_dict(), again.state_dict()):
        raise InputError(f"features={network.features} is of another network than the run's backbone: format=onnx")
    return Lines(
        ["import sslctl", "", f"model, preprocess = sslctl.load({FILE})"],
        "features = model(images)",
    )


def _write_safetensors(network: Network, path: Path) -> None:
    save_backbone(path, network.backbone, with_pooling(network.node, network.pool), network.preprocess)


# --- ONNX and torch.export: the whole calculation, normalisation inside ---


def _onnx_lines(network: Network) -> Lines:
    lacking = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(f"format=onnx needs {', '.join(lacking)}: pip install 'sslctl[onnx]'")
    size = sum(t.numel() * t.element_size() for t in network.module.state_dict().values())
    if size >= 2**31:
        raise InputError(
            f"an ONNX file holds less than 2 GiB, this network has {size / 2**30:.1f}: format=torch_export"
        )
    load = [
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession({FILE}, providers=["CPUExecutionProvider"])',
    ]
    return Lines(
        load, f'features = session.run(["features"], {{"{_input(network)}": {_input(network)}}})[0]', arrays=True
    )


def _write_onnx(network: Network, path: Path) -> None:
    import onnx

    with _traceable():
        torch.onnx.export(
            network.module,
            (_example(network),),
            path,
            input_names=[_input(network)],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    onnx.checker.check_model(path)


def _torch_export_lines(network: Network) -> Lines:
    return Lines(
        ["import torch", "", f"model = torch.export.load({FILE}).module()"],
        f"features = model({_input(network)})",
    )


def _write_torch_export(network: Network, path: Path) -> None:
    with _traceable():
        module = network.module
        if network.backbone is None:
            module = _used_part(_program(module, network))
        torch.export.save(_program(module, network), path)


def _program(module: nn.Module, network: Network) -> torch.export.ExportedProgram:
    return torch.export.export(module, (_example(network),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _used_part(program: torch.export.ExportedProgram) -> nn.Module:
    """Returns the graph of a program without the tensors that it does not look at: those of a method's heads."""
    graph = program.module(check_guards=False)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in used:
            place, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(place), leaf)
    return graph


def _input(network: Network) -> str:
    """Returns what the input is called in the lines that load a file."""
    return "tokens" if network.preprocess.modality == TEXTS else "images"


def _example(network: Network) -> Tensor:
    return network.preprocess.example(torch.device("cpu"))


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """Switches off gradients, and the fused attention of torch's encoder layers, which other programs do not have."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


FORMATS = {
    "torchvision": Format(".pth", "torchvision", _torchvision_lines, _write_torchvision, _own_tensors),
    "timm": Format(".safetensors", "timm", _timm_lines, _write_timm, _own_tensors),
    "safetensors": Format(
        ".safetensors",
        "sslctl.load",
        _safetensors_lines,
        _write_safetensors,
        lambda network: _contiguous(network.backbone),
    ),
    "onnx": Format(".onnx", "onnxruntime", _onnx_lines, _write_onnx, None),
    "torch_export": Format(".pt2", "torch.export", _torch_export_lines, _write_torch_export, None),
}
