import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from sslctl.factory.backbone_file import load_backbone, save_backbone
from sslctl.models.backbones import Backbone, ResNet, SmallResNet, Timm
from sslctl.models.preprocess import Preprocess
from sslctl.models.weights import load_weights, read_weights, weights_sha256
from sslctl.runs import checkpoint
from sslctl.runs.checkpoint import CheckpointError

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
RESNET18 = 120  # tensors without the classifier


def resnet18(stem="imagenet"):
    return Backbone(ResNet(18, stem, False, "batch", 3, 224), MEAN, STD)


def timm_resnet18():
    return Backbone(Timm("resnet18", 3, 224, {}), MEAN, STD)


def small(width=8):
    torch.manual_seed(0)
    return Backbone(SmallResNet([6, width], 1, 1, "batch", 3, 16), MEAN, STD)


@pytest.fixture(scope="module")
def foreign():
    """torchvision's ResNet-18 with a classifier; timm's has the same names."""
    torch.manual_seed(7)
    model = torchvision.models.resnet18(num_classes=10)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.add_(torch.rand_like(tensor))
        if name.endswith("num_batches_tracked"):
            tensor.add_(41)
    return model.eval()


def save(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


def inner(module):
    """The tensors of a small backbone's network under their bare names, all of them changed."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor + 5
        for name, tensor in module.network.state_dict().items()
    }


def assert_loaded(backbone, tensors):
    actual = backbone.network.state_dict()
    assert actual.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(actual[name], tensor), name


def assert_unchanged(backbone, before):
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def state_of(backbone):
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


# --- Whole files ---


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".pth"])
def test_load_weights_takes_torchvisions_resnet_whole(foreign, tmp_path, suffix):
    backbone = resnet18().eval()
    report = load_weights(backbone, save(tmp_path / f"r18{suffix}", foreign.state_dict()), partial=False)
    assert f"{RESNET18} of {RESNET18} tensors matched, 0 missing; left out: 2 of fc" in report
    assert f"r18{suffix}" in report
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    headless = copy.deepcopy(foreign)
    headless.fc = nn.Identity()
    with torch.no_grad():
        expected = headless(backbone.normalize(images))
        torch.testing.assert_close(backbone(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.mean.flatten(), torch.tensor(MEAN))  # the normalisation stays sslctl's
    torch.testing.assert_close(backbone.std.flatten(), torch.tensor(STD))


@pytest.mark.parametrize("make", [resnet18, timm_resnet18], ids=["torchvision", "timm"])
def test_load_weights_takes_timms_resnet_whole(tmp_path, make):
    torch.manual_seed(9)
    model, backbone = timm.create_model("resnet18", num_classes=7).eval(), make().eval()
    report = load_weights(backbone, save(tmp_path / "timm.pt", model.state_dict()), partial=False)
    assert f"{RESNET18} of {RESNET18} tensors matched" in report
    assert "left out: 2 of fc" in report
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.forward_features(backbone.normalize(images)).mean((2, 3))
        torch.testing.assert_close(backbone(images), expected, atol=1e-5, rtol=1e-4)


def test_load_weights_takes_timms_transformer_whole(tmp_path):
    kwargs = {"patch_size": 8, "depth": 1}
    torch.manual_seed(9)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **kwargs)
    backbone = Backbone(Timm("vit_tiny_patch16_224", 3, 32, kwargs), MEAN, STD)
    report = load_weights(backbone, save(tmp_path / "vit.safetensors", model.state_dict()), partial=False)
    expected = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
    assert f"{len(expected)} of {len(expected)} tensors matched, 0 missing; left out: 2 of head" in report
    assert_loaded(backbone, {f"model.{name}": tensor for name, tensor in expected.items()})


def test_other_widths_are_not_said_to_be_other_sizes(tmp_path):
    kwargs = {"patch_size": 8, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, embed_dim=96, **kwargs)
    file = save(tmp_path / "vit.safetensors", model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_weights(Backbone(Timm("vit_tiny_patch16_224", 3, 24, kwargs), MEAN, STD), file, partial=False)
    assert "resampled" not in str(caught.value)


def test_a_network_of_other_heads_is_told_to_be_so(tmp_path):
    """They leave no trace in the weights' shapes."""
    vit = Backbone(Timm("vit_tiny_patch16_224", 3, 16, {"depth": 1, "num_heads": 6}), MEAN, STD)
    settings = Preprocess(3, 16, 16, MEAN, STD)
    save_backbone(tmp_path / "vit.safetensors", vit, {"kwargs": {"depth": 1, "num_heads": 6}}, settings)
    file, other = (
        str(tmp_path / "vit.safetensors"),
        Backbone(Timm("vit_tiny_patch16_224", 3, 16, {"depth": 1}), MEAN, STD),
    )
    assert load_weights(vit, file, partial=False).endswith("0 missing")
    assert "backbone.kwargs.num_heads=6" in load_weights(other, file, partial=False)


def test_a_network_that_cannot_resample_its_positions_takes_one_size():
    with pytest.raises(ValueError, match="takes the images' own size only, 32"):
        Timm("pit_ti_224", 3, 32, {"img_size": 64})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_weights_takes_its_own_backbones_with_their_normalisation(tmp_path, suffix):
    source, backbone = small(), Backbone(SmallResNet([6, 8], 1, 1, "batch", 3, 16), [0.0] * 3, [1.0] * 3)
    source.load_state_dict({f"network.{name}": tensor for name, tensor in inner(source).items()}, strict=False)
    report = load_weights(backbone, save(tmp_path / f"own{suffix}", source.state_dict()), partial=False)
    assert f"{len(source.state_dict())} of {len(source.state_dict())} tensors matched, 0 missing" in report
    assert_unchanged(backbone, source.state_dict())


@pytest.mark.parametrize("finished", [True, False])
def test_load_weights_takes_the_backbone_of_a_run(tmp_path, finished):
    """Its backbone.safetensors when it is finished, before that the backbone inside its newest checkpoint."""
    method, backbone = nn.Module(), small()
    method.backbone, method.projector = small(), nn.Linear(8, 4)
    changed = {f"network.{name}": tensor for name, tensor in inner(backbone).items()}
    method.backbone.load_state_dict(changed, strict=False)
    for name in ("config.yaml", "environment.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_weights(backbone, str(tmp_path), partial=False)
    if finished:
        save(tmp_path / "backbone.safetensors", method.backbone.state_dict())
    else:
        checkpoint.save(tmp_path, 3, method, {"step": 3}, keep_last=2)
    report = load_weights(backbone, str(tmp_path), partial=False)
    assert ("not finished: of its student" in report) == (not finished)
    assert_unchanged(backbone, method.backbone.state_dict())


def test_weights_of_a_network_that_saw_or_pooled_otherwise_are_told_to_be_so(tmp_path):
    settings = Preprocess(3, 16, 16, [0.5] * 3, [0.3] * 3)
    backbone = small()
    save_backbone(tmp_path / "own.safetensors", backbone, {}, settings)
    assert load_weights(backbone, str(tmp_path / "own.safetensors"), partial=False).endswith("0 missing")
    backbone.sees_lightness = True
    save_backbone(tmp_path / "grey.safetensors", backbone, {}, settings)
    assert "saw the lightness of colours alone" in load_weights(
        small(), str(tmp_path / "grey.safetensors"), partial=False
    )
    vit = Backbone(Timm("vit_tiny_patch16_224", 3, 16, {"depth": 1}), [0.5] * 3, [0.3] * 3)
    save_backbone(tmp_path / "mean.safetensors", vit, {"kwargs": {"global_pool": "avg", "fc_norm": False}}, settings)
    assert "+backbone.kwargs.global_pool=avg" in load_weights(vit, str(tmp_path / "mean.safetensors"), partial=False)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "backbone.", "encoder.", "network.", "backbone.network.", "student.backbone."]
)
def test_load_weights_strips_a_wrappers_prefix(tmp_path, prefix):
    backbone = small()
    tensors = inner(backbone)
    content = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    content |= {"projector.0.weight": torch.zeros(3, 3)} if prefix.endswith("backbone.") else {}
    report = load_weights(backbone, save(tmp_path / "file.pt", content), partial=False)
    assert f"{len(tensors)} of {len(tensors)} tensors matched, 0 missing" in report
    assert_loaded(backbone, tensors)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"state_dict": t, "epoch": 3, "arch": "resnet18"},
        lambda t: {"model": t, "optimizer": {"lr": 0.1}},
        lambda t: {"model_state_dict": t},
        lambda t: {"state_dict": {"model": t}},
        lambda t: {"state_dict": {f"module.{name}": tensor for name, tensor in t.items()}},
        lambda t: {"student": {}, "teacher": {f"backbone.{name}": tensor for name, tensor in t.items()}},
    ],
    ids=["state_dict", "model", "model_state_dict", "twice", "with prefix", "teacher"],
)
def test_load_weights_looks_inside_a_nested_file(tmp_path, wrap):
    backbone = small()
    tensors = inner(backbone)
    load_weights(backbone, save(tmp_path / "file.pt", wrap(tensors)), partial=False)
    assert_loaded(backbone, tensors)


@pytest.mark.parametrize(("student", "other"), [("encoder_q", "encoder_k"), ("base_encoder", "momentum_encoder")])
def test_load_weights_takes_the_student_of_mocos_official_checkpoints(foreign, tmp_path, student, other):
    state = {f"module.{student}.{name}": tensor for name, tensor in foreign.state_dict().items()}
    state |= {name.replace(student, other): tensor + 1 for name, tensor in state.items() if tensor.is_floating_point()}
    state |= {"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1)}
    backbone = resnet18()
    load_weights(backbone, save(tmp_path / "a.pth", {"epoch": 200, "state_dict": state}), partial=False)
    assert torch.equal(backbone.network.conv1.weight, foreign.conv1.weight)
    assert torch.equal(backbone.network.layer4[1].bn2.running_var, foreign.layer4[1].bn2.running_var)


def test_load_weights_needs_no_batch_counters(tmp_path):
    """Files from before PyTorch 0.4.1 have none, and nothing reads them."""
    backbone = small()
    tensors = {n: t for n, t in inner(backbone).items() if not n.endswith("num_batches_tracked")}
    report = load_weights(backbone, save(tmp_path / "old.pt", tensors), partial=False)
    assert f"{len(tensors)} of {len(tensors)} tensors matched, 0 missing" in report
    for name, tensor in tensors.items():
        assert torch.equal(backbone.network.state_dict()[name], tensor)


def test_load_weights_copies_into_the_existing_tensors(tmp_path):
    backbone = small()
    places = {name: tensor.data_ptr() for name, tensor in backbone.state_dict().items()}
    load_weights(backbone, save(tmp_path / "file.pt", inner(backbone)), partial=False)
    assert {name: tensor.data_ptr() for name, tensor in backbone.state_dict().items()} == places


# --- What does not fit ---


def test_load_weights_refuses_missing_tensors_with_counts_and_names(tmp_path):
    backbone = small()
    tensors, before = inner(backbone), state_of(backbone)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.1.")}
    missing = len(tensors) - len(kept)
    with pytest.raises(CheckpointError) as caught:
        load_weights(backbone, save(tmp_path / "part.pt", kept), partial=False)
    message = str(caught.value)
    counted = sum(not name.endswith("num_batches_tracked") for name in tensors.keys() - kept.keys())
    assert f"{len(kept)} of {len(kept) + counted} tensors matched, {counted} missing" in message
    assert 0 < counted < missing
    assert f"{counted} tensors missing: network.layers.1." in message
    assert "backbone.partial=true" in message
    assert "part.pt" in message
    assert_unchanged(backbone, before)


def test_load_weights_refuses_unexpected_tensors_with_counts_and_names(tmp_path):
    backbone = small()
    before = state_of(backbone)
    content = {**inner(backbone), "layers.9.conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(backbone, save(tmp_path / "more.pt", content), partial=False)
    message = str(caught.value)
    assert "0 missing; left out: 1 of fc" in message
    assert "1 tensors unexpected: layers.9.conv1.weight" in message
    assert_unchanged(backbone, before)


def test_load_weights_refuses_tensors_of_another_shape_with_both_shapes(tmp_path):
    backbone = small()
    before = state_of(backbone)
    content = inner(backbone) | {"conv1.weight": torch.zeros(6, 3, 7, 7)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(backbone, save(tmp_path / "stem.pt", content), partial=False)
    message = str(caught.value)
    assert "1 tensors of another shape: network.conv1.weight: (6, 3, 7, 7) found, (6, 3, 3, 3) expected" in message
    assert f"{len(content) - 1} of {len(content)} tensors matched, 1 missing" in message
    assert_unchanged(backbone, before)


@pytest.mark.parametrize(
    "wrong",
    [lambda t: t.sum(), lambda t: t.flatten(), lambda t: t[:1], lambda t: t.unsqueeze(0)],
    ids=["scalar", "flat", "one row", "one dimension more"],
)
def test_load_weights_never_broadcasts_or_reshapes(tmp_path, wrong):
    backbone = small()
    before, content = state_of(backbone), inner(backbone)
    content["conv1.weight"] = wrong(content["conv1.weight"]).clone()
    path = save(tmp_path / "file.pt", content)
    with pytest.raises(CheckpointError, match="of another shape"):
        load_weights(backbone, path, partial=False)
    load_weights(backbone, path, partial=True)
    assert torch.equal(backbone.network.conv1.weight, before["network.conv1.weight"])


def test_load_weights_of_an_imagenet_stem_into_a_small_one_needs_consent(foreign, tmp_path):
    path, backbone = save(tmp_path / "r18.pt", foreign.state_dict()), resnet18(stem="small")
    stem = backbone.network.conv1.weight.clone()
    with pytest.raises(CheckpointError, match=r"network.conv1.weight: \(64, 3, 7, 7\) found, \(64, 3, 3, 3\) expected"):
        load_weights(backbone, path, partial=False)
    report = load_weights(backbone, path, partial=True)
    assert f"{RESNET18 - 1} of {RESNET18} tensors matched, 1 missing" in report
    assert torch.equal(backbone.network.conv1.weight, stem)
    assert torch.equal(backbone.network.layer4[1].bn2.running_mean, foreign.layer4[1].bn2.running_mean)


def test_load_weights_partial_loads_exactly_what_matches(tmp_path):
    backbone = small()
    tensors, before = inner(backbone), state_of(backbone)
    content = {n: t for n, t in tensors.items() if n.startswith("layers.0.")} | {"stranger": torch.zeros(2)}
    report = load_weights(backbone, save(tmp_path / "part.pt", content), partial=True)
    assert f"{len(content) - 1} of " in report
    assert "left out: 1 of stranger" in report
    for name, tensor in backbone.network.state_dict().items():
        expected = tensors[name] if name.startswith("layers.0.") else before[f"network.{name}"]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("partial", [False, True])
def test_load_weights_of_another_model_is_refused_even_in_part(tmp_path, partial):
    backbone = small()
    before = state_of(backbone)
    content = {"encoder.block.weight": torch.zeros(3, 3), "encoder.block.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"0 of \d+ tensors matched"):
        load_weights(backbone, save(tmp_path / "other.pt", content), partial=partial)
    assert_unchanged(backbone, before)


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, {"state_dict": {}}, [torch.zeros(2)], torch.zeros(2), "words"],
    ids=["empty", "numbers", "empty inside", "list", "tensor", "string"],
)
def test_read_weights_refuses_what_is_no_dictionary_of_tensors(tmp_path, content):
    with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
        read_weights(Path(save(tmp_path / "file.pt", content)))


@pytest.mark.parametrize(("name", "words"), [("absent.pt", "no such file"), ("", "not a run or a file")])
def test_read_weights_names_a_path_that_is_no_file(tmp_path, name, words):
    with pytest.raises(CheckpointError, match=re.escape(f"backbone.weights={tmp_path / name}: {words}")):
        read_weights(tmp_path / name)


# --- Values that are no weights ---


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_load_weights_refuses_values_that_are_not_finite(tmp_path, value, partial):
    backbone = small()
    before, content = state_of(backbone), inner(backbone)
    content["conv1.weight"][0, 1, 2, 0] = content["conv1.weight"][3, 0, 0, 0] = value
    content["bn1.running_var"][:] = value
    with pytest.raises(CheckpointError) as caught:
        load_weights(backbone, save(tmp_path / "file.pt", content), partial=partial)
    assert "file.pt: 2 tensors hold values that are not finite numbers" in str(caught.value)
    assert "network.conv1.weight (2 of 162 values)" in str(caught.value)
    assert "network.bn1.running_var (6 of 6 values)" in str(caught.value)
    assert_unchanged(backbone, before)


def test_load_weights_passes_over_the_values_of_tensors_that_are_not_loaded(tmp_path):
    backbone = small()
    content = inner(backbone) | {"fc.weight": torch.full((2, 2), torch.nan)}
    assert " 0 missing" in load_weights(backbone, save(tmp_path / "file.pt", content), partial=False)


def test_load_weights_takes_the_infinities_that_the_network_has_itself(tmp_path):
    """The mask of an attention."""
    backbone = small()
    backbone.network.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    path = save(tmp_path / "file.pt", inner(backbone) | {"mask": backbone.network.mask.clone()})
    assert " 0 missing" in load_weights(backbone, path, partial=False)
    path = save(tmp_path / "file.pt", inner(backbone) | {"mask": torch.full((2, 2), -torch.inf)})
    with pytest.raises(CheckpointError, match=r"network.mask \(3 of 4 values\)"):
        load_weights(backbone, path, partial=False)


def test_load_weights_refuses_what_overflows_as_the_network_holds_it(tmp_path):
    content = inner(small())
    content["conv1.weight"] = content["conv1.weight"].double() * 1e300
    with pytest.raises(CheckpointError, match=r"network.conv1.weight \(162 of 162 values\)"):
        load_weights(small(), save(tmp_path / "file.pt", content), partial=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_load_weights_refuses_what_is_not_floating_point(tmp_path, dtype):
    backbone = small()
    before, content = state_of(backbone), inner(backbone)
    quantised = {name: t.to(dtype) if t.is_floating_point() else t for name, t in content.items()}
    one = content | {"conv1.weight": quantised["conv1.weight"]}
    for part in (quantised, one):
        with pytest.raises(CheckpointError) as caught:
            load_weights(backbone, save(tmp_path / "file.pt", part), partial=False)
        assert "of another type: " in str(caught.value)
        assert f"{dtype} found, torch.float32 expected" in str(caught.value)
        assert_unchanged(backbone, before)
    load_weights(backbone, save(tmp_path / "file.pt", one), partial=True)
    assert torch.equal(backbone.network.conv1.weight, before["network.conv1.weight"])
    assert torch.equal(backbone.network.bn1.weight, content["bn1.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_weights_takes_floating_point_of_any_precision(tmp_path, dtype):
    backbone, content = small(), inner(small())
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in content.items()}
    load_weights(backbone, save(tmp_path / "file.pt", cast), partial=False)
    assert torch.equal(backbone.network.conv1.weight, cast["conv1.weight"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.fill_(torch.nan), r"network.conv1.weight \(162 of 162 values\)"),
        (lambda weight: weight.to(torch.int8), "network.conv1.weight: torch.int8 found, torch.float32 expected"),
    ],
    ids=["not finite", "int8"],
)
def test_a_backbones_own_file_is_refused_for_values_that_are_no_weights(change, message, tmp_path):
    node = {"_target_": "sslctl.models.backbones.SmallResNet", "widths": [6, 8], "blocks": 1, "stem_stride": 1}
    node |= {"norm": "batch"}
    path, backbone = tmp_path / "own.safetensors", small()
    save_backbone(path, backbone, node, Preprocess(3, 16, 16, MEAN, STD))
    assert_unchanged(load_backbone(path)[0], backbone.state_dict())  # the control
    stored = checkpoint.load_tensors(path)
    stored["network.conv1.weight"] = change(stored["network.conv1.weight"])
    checkpoint.save_tensors(path, stored, checkpoint.metadata(path), signed=True)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(path)


def damaged(raw):
    """Cut off at many places, the empty file among them, and with single bytes changed in the header."""
    for part in range(0, 40):
        yield raw[: len(raw) * part // 40]
    for place in range(0, min(len(raw), 300), 3):
        yield raw[:place] + bytes([raw[place] ^ 0x15]) + raw[place + 1 :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "safetensors"])
def test_read_weights_of_a_damaged_file_never_ends_in_another_error(tmp_path, form):
    """A change that reads as other names or numbers cannot be noticed here; everything else names the path."""
    content = {"state_dict": {f"layer{i}.weight": torch.rand(3, 4) for i in range(3)}, "epoch": 4}
    path, buffer = tmp_path / f"file{'.safetensors' if form == 'safetensors' else '.pt'}", io.BytesIO()
    if form == "safetensors":
        save_file(content["state_dict"], path)
        buffer.write(path.read_bytes())
    elif form == "pickle":
        pickle.dump({"names": list(content["state_dict"])}, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
    refused, leaks = [], set()
    for raw in damaged(buffer.getvalue()):
        path.write_bytes(raw)
        try:
            read_weights(path)
        except CheckpointError as error:
            refused.append(str(error))
        except Exception as error:  # collected, so that one run shows them all
            leaks.add(f"{type(error).__name__}: {error}"[:80])
    assert leaks == set()
    assert len(refused) >= 40  # at least all the cut ones
    assert all(str(path) in message for message in refused)


# --- Nothing runs ---


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["evil.pt", "evil.ckpt", "evil.safetensors", "evil"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_load_weights_never_runs_a_files_code(tmp_path, name, form):
    canary, path, backbone = tmp_path / "canary", tmp_path / name, small()
    before = state_of(backbone)
    content = {"state_dict": inner(backbone), "extra": Malicious(canary)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for partial in (False, True):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_weights(backbone, str(path), partial=partial)
    assert not canary.exists()
    assert_unchanged(backbone, before)
    raw = path.read_bytes()
    armed = pickle.loads(raw) if form == "pickle" else torch.load(io.BytesIO(raw), weights_only=False)
    armed["extra"].close()
    assert canary.exists()  # the positive control: whoever trusts the file runs its code


# --- The digest ---


def test_weights_sha256_is_of_the_values_only():
    backbone = small()
    digest = weights_sha256(backbone)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert weights_sha256(copy.deepcopy(backbone)) == digest
    assert weights_sha256(copy.deepcopy(backbone).to(memory_format=torch.channels_last)) == digest
    assert weights_sha256(small(width=7)) != digest


@pytest.mark.parametrize("name", ["network.conv1.weight", "network.bn1.running_var", "mean"])
def test_weights_sha256_changes_with_one_bit(name):
    backbone = small()
    digest = weights_sha256(backbone)
    bits = backbone.state_dict()[name].view(torch.int32).view(-1)
    bits[-1] ^= 1
    assert weights_sha256(backbone) != digest
    bits[-1] ^= 1
    assert weights_sha256(backbone) == digest


def test_weights_sha256_changes_with_a_counter_and_with_a_name():
    backbone = small()
    digest = weights_sha256(backbone)
    backbone.network.bn1.num_batches_tracked += 1
    assert weights_sha256(backbone) != digest
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    assert weights_sha256(nn.ModuleDict({"a": linear})) != weights_sha256(nn.ModuleDict({"b": linear}))
