"""The files that `sslctl export` writes: for each format, whether it takes a network, the writing, the loading and its lines."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sslctl.data.modality import TEXTS
from sslctl.errors import InputError
from sslctl.export import libraries
from sslctl.export.format import FILE, Format, Lines, Loaded, Network
from sslctl.factory.backbone_file import load, save_backbone
from sslctl.factory.exportable import with_pooling
from sslctl.factory.from_config import build_backbone
from sslctl.runs.checkpoint import compare

# --- safetensors: sslctl's own names, with all it takes to build the backbone again ---


def _safetensors_lines(network: Network) -> Lines:
    if network.backbone is None:
        raise InputError(
            f"format=safetensors holds a backbone's weights, and features={network.features} of this method is not a"
            " backbone's own output: format=onnx or torch_export, or other features=",
            advice=["format=torch_export"],
        )
    again = build_backbone(with_pooling(network.node, network.pool), network.preprocess, with_weights=False)
    if compare(network.backbone.state_dict(), again.state_dict()):
        raise InputError(
            f"features={network.features} is of another network than the run's backbone: format=onnx",
            advice=["format=onnx"],
        )
    return Lines(
        ["import sslctl", "", f"model, preprocess = sslctl.load({FILE})"],
        "features = model(images)",
    )


def _write_safetensors(network: Network, path: Path) -> None:
    save_backbone(path, network.backbone, with_pooling(network.node, network.pool), network.preprocess)


def _load_safetensors(network: Network, path: Path) -> Loaded:
    model, _ = load(path)
    return Loaded(model, model)


# --- ONNX and torch.export: the whole calculation, normalisation inside ---


def _onnx_lines(network: Network) -> Lines:
    lacking = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(f"format=onnx needs {', '.join(lacking)}: pip install 'sslctl[onnx]'")
    size = sum(t.numel() * t.element_size() for t in network.module.state_dict().values())
    if size >= 2**31:
        raise InputError(
            f"an ONNX file holds less than 2 GiB, this network has {size / 2**30:.1f}: format=torch_export",
            advice=["format=torch_export"],
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


def _load_onnx(network: Network, path: Path) -> Loaded:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return Loaded(None, lambda images: torch.as_tensor(session.run(["features"], {_input(network): images.numpy()})[0]))


def _torch_export_lines(network: Network) -> Lines:
    return Lines(
        ["import torch", "", f"model = torch.export.load({FILE}).module()"],
        f"features = model({_input(network)})",
    )


def _load_torch_export(network: Network, path: Path) -> Loaded:
    model = torch.export.load(path).module()
    return Loaded(model, model)


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
    "torchvision": Format(
        ".pth",
        "torchvision",
        libraries.torchvision_lines,
        libraries.write_torchvision,
        libraries.load_torchvision,
        libraries.own_tensors,
    ),
    "timm": Format(
        ".safetensors", "timm", libraries.timm_lines, libraries.write_timm, libraries.load_timm, libraries.own_tensors
    ),
    "safetensors": Format(
        ".safetensors",
        "sslctl.load",
        _safetensors_lines,
        _write_safetensors,
        _load_safetensors,
        lambda network: libraries.contiguous(network.backbone),
    ),
    "onnx": Format(".onnx", "onnxruntime", _onnx_lines, _write_onnx, _load_onnx, None),
    "torch_export": Format(".pt2", "torch.export", _torch_export_lines, _write_torch_export, _load_torch_export, None),
}
