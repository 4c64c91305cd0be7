"""Checkpoints: what is written comes back, what is damaged is noticed, what is old goes only when something newer is there."""

import copy
import json
import os
import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from sslctl.runs import checkpoint
from sslctl.runs.checkpoint import CheckpointError
from sslctl.runs.generators import generator_states, restore_generators
from sslctl.runs.manifest import read_manifest
from sslctl.runs.plain import NotPlain
from sslctl.training.optim import LARS
from sslctl.training.saved_state import load_optimizer_state, optimizer_state

FORMATS = [torch.contiguous_format, torch.channels_last]


def state_at(step):
    generators = [generator_states()]
    return {"step": step, "optimizer": {}, "generators": generators, "threads": 1, "scaler": {}, "skipped": [0, 0]}


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


# --- Tensors in a file ---


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).view(2, 3),
        torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).T,
        torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last),
        torch.tensor(7),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.tensor([1.5, float("inf"), float("nan")], dtype=torch.bfloat16),
        torch.arange(10.0)[2:5],
    ],
    ids=["int64", "transposed", "channels_last", "0-dim", "empty", "bool", "bf16", "a part"],
)
def test_tensors_come_back_as_they_were(tensor, tmp_path):
    checkpoint.save_tensors(tmp_path / "t.safetensors", {"t": tensor})
    actual = checkpoint.load_tensors(tmp_path / "t.safetensors")["t"]
    assert (actual.dtype, actual.shape) == (tensor.dtype, tensor.shape)
    assert torch.allclose(actual.double(), tensor.double(), rtol=0, atol=0, equal_nan=True)


def test_tied_parameters_are_stored_once(tmp_path):
    module, separate = Tied(), {name: t.clone() for name, t in Tied().state_dict().items()}
    checkpoint.save_tensors(tmp_path / "tied", module.state_dict())
    checkpoint.save_tensors(tmp_path / "separate", separate)
    saved = (tmp_path / "separate").stat().st_size - (tmp_path / "tied").stat().st_size
    assert saved >= 4 * 4 * 4 - 32, "the shared 64 bytes are in the file twice"
    actual = checkpoint.load_tensors(tmp_path / "tied")
    assert actual.keys() == module.state_dict().keys()
    assert all(torch.equal(actual[name], t) for name, t in module.state_dict().items())


def test_tied_parameters_stay_tied_when_loaded(tmp_path):
    module = Tied()
    path = checkpoint.save(tmp_path, 1, module, state_at(1), keep_last=2)
    other = Tied()
    checkpoint.load(path, other)
    assert torch.equal(other.second.weight, module.first.weight)
    assert other.second.weight is other.first.weight


def test_different_views_of_one_storage_keep_their_own_values(tmp_path):
    storage = torch.arange(6.0)
    tensors = {"whole": storage, "part": storage[:3], "rows": storage.view(2, 3), "columns": storage.view(3, 2)}
    checkpoint.save_tensors(tmp_path / "t", tensors)
    actual = checkpoint.load_tensors(tmp_path / "t")
    assert all(torch.equal(actual[name], t) for name, t in tensors.items())


def test_metadata_is_kept_beside_the_aliases(tmp_path):
    from safetensors import safe_open

    checkpoint.save_tensors(tmp_path / "t", {"a": torch.ones(1)}, {"step": "12"})
    with safe_open(tmp_path / "t", "pt") as opened:
        assert opened.metadata()["step"] == "12"


# --- Saving and loading ---


def test_loading_copies_into_the_tensors_that_are_there(tmp_path):
    saved = linear(seed=1)
    path = checkpoint.save(tmp_path, 3, saved, state_at(3), keep_last=2)
    module = linear(seed=2)
    weight = module.weight
    assert checkpoint.load(path, module)["step"] == 3
    assert module.weight is weight
    assert torch.equal(weight, saved.weight)


def test_a_saved_optimizer_continues_as_if_it_had_not_been_saved(tmp_path):
    def step(module, optimizer):
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    module = linear()
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    step(module, optimizer)
    path = checkpoint.save(tmp_path, 1, module, state_at(1) | {"optimizer": optimizer.state_dict()}, keep_last=2)
    other = linear(seed=9)
    resumed = torch.optim.AdamW(other.parameters(), 0.1)
    resumed.load_state_dict(checkpoint.load(path, other)["optimizer"])
    step(module, optimizer)
    step(other, resumed)
    assert torch.equal(module.weight, other.weight)


@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, torch.optim.SGD, LARS])
@pytest.mark.parametrize("formats", [FORMATS, FORMATS[::-1]])
def test_an_optimizer_continues_in_another_memory_format(optimizer_of, formats):
    """torch's fused optimizers go through weights and state as they lie in memory, on a CPU in silence."""
    settings = {"momentum": 0.9, "trust": 0.1} if optimizer_of is LARS else {"fused": True}
    settings |= {"momentum": 0.9} if optimizer_of is torch.optim.SGD else {}
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def begin(memory_format):
        weight = nn.Parameter(start.clone(memory_format=memory_format))
        return weight, optimizer_of([weight], lr=0.1, **settings)

    def step(weight, optimizer):
        weight.grad = weight.detach().square()
        optimizer.step()

    weight, optimizer = begin(formats[0])
    step(weight, optimizer)
    other, resumed = begin(formats[1])
    load_optimizer_state(resumed, copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        other.copy_(weight)
    step(weight, optimizer)
    step(other, resumed)
    torch.testing.assert_close(other, weight)


def test_arrays_and_strings_of_an_optimizer_come_back(tmp_path):
    module, other = linear(), linear()
    optimizer, resumed = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (module, other))
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    kept = {"name": "warm", "numbers": [np.arange(3), {"deep": np.float32(0.1)}], "count": 2}
    optimizer.state[module.weight] |= kept
    state = state_at(1) | {"optimizer": optimizer_state(optimizer, module)}
    path = checkpoint.save(tmp_path, 1, module, state, keep_last=2)
    load_optimizer_state(resumed, checkpoint.load(path, other)["optimizer"])
    actual = resumed.state[other.weight]
    assert torch.equal(actual.pop("momentum_buffer"), optimizer.state[module.weight]["momentum_buffer"])
    assert repr(actual) == repr(kept)


def test_last_names_the_newest(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, linear(), state_at(step), keep_last=2)
        assert (tmp_path / "last").read_text() == f"checkpoints/step-{step}\n"


@pytest.mark.parametrize("keep_last", [2, 3])
def test_only_the_newest_are_kept(keep_last, tmp_path):
    for step in (5, 10, 15, 20, 100):
        checkpoint.save(tmp_path, step, linear(), state_at(step), keep_last)
    assert [p.name for p in checkpoint.steps_on_disk(tmp_path)] == ["step-100", "step-20", "step-15"][:keep_last]
    assert checkpoint.newest_valid(tmp_path).name == "step-100"


def test_what_is_later_than_the_step_that_is_saved_goes(tmp_path):
    """It was damaged: the run went on from a checkpoint before it."""
    for step in (5, 10, 8):
        checkpoint.save(tmp_path, step, linear(), state_at(step), keep_last=3)
    assert [p.name for p in checkpoint.steps_on_disk(tmp_path)] == ["step-8", "step-5"]


def test_saving_a_damaged_step_again_replaces_it(tmp_path):
    path = checkpoint.save(tmp_path, 4, linear(seed=1), state_at(4), keep_last=2)
    (path / "weights.safetensors").write_bytes(b"damaged")
    path = checkpoint.save(tmp_path, 4, linear(seed=2), state_at(4), keep_last=2)
    checkpoint.verify(path)
    module = linear()
    checkpoint.load(path, module)
    assert torch.equal(module.weight, linear(seed=2).weight)


def test_nothing_but_the_checkpoint_is_left_behind(tmp_path):
    checkpoint.save(tmp_path, 1, linear(), state_at(1), keep_last=2)
    actual = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    step = "checkpoints/step-1"
    files = [f"{step}/manifest.json", f"{step}/state.pt", f"{step}/weights.safetensors"]
    assert actual == ["checkpoints", step, *files, "last"]


class RunsCode:
    """What would make a folder, were it unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_state_that_runs_code_is_refused_before_it_does(tmp_path):
    torch.save({"step": 1, "optimizer": RunsCode(tmp_path / "made")}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt .* is not a file of tensors and plain values"):
        checkpoint.load_pickle(tmp_path / "state.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("lacking", ["optimizer", "scaler", "generators.numpy"])
def test_a_state_that_lacks_something_is_refused(lacking, tmp_path):
    state = state_at(1)
    part, _, inner = lacking.partition(".")
    del (state[part][0] if inner else state)[inner or part]
    path = checkpoint.save(tmp_path, 1, linear(), state, keep_last=2)
    with pytest.raises(CheckpointError, match=rf"lacks {lacking}: the run cannot continue exactly"):
        checkpoint.load(path, linear())


def test_a_state_that_is_not_plain_is_not_needed_to_read_it(tmp_path):
    path = checkpoint.save(tmp_path, 1, linear(), state_at(1), keep_last=2)
    assert torch.load(path / "state.pt", weights_only=True)["step"] == 1


NUMPY = [
    np.float32(0.1),
    np.float64(0.1),
    np.int64(-3),
    np.bool_(True),
    np.array(2.0),
    np.arange(6.0).reshape(2, 3).T,
    np.empty((0, 2), "i2"),
]


@pytest.mark.parametrize("value", NUMPY, ids=repr)
def test_numpys_values_come_back_as_they_were(value, tmp_path):
    state = state_at(1) | {"optimizer": {"state": {0: {"deep": [({"a": value},)]}}}}
    path = checkpoint.save(tmp_path, 1, linear(), state, keep_last=2)
    torch.load(path / "state.pt", weights_only=True)
    actual = checkpoint.load(path, linear())["optimizer"]["state"][0]["deep"][0][0]["a"]
    assert (type(actual), actual.dtype, actual.shape) == (type(value), value.dtype, value.shape)
    assert np.array_equal(actual, value)


@pytest.mark.parametrize(
    "value",
    [deque([1]), RunsCode("x"), np.array([None]), {deque: 1}, torch.nn.Linear(1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_what_no_checkpoint_can_hold_is_refused_before_anything_is_written(value, tmp_path):
    with pytest.raises(NotPlain, match=r"the state\['optimizer'\]\['mine'\]\[1\] is a .* which no checkpoint can hold"):
        checkpoint.save(tmp_path, 1, linear(), state_at(1) | {"optimizer": {"mine": [0, value]}}, keep_last=2)
    assert list(tmp_path.iterdir()) == []


# --- The manifest ---


def test_the_manifest_lists_sizes_and_hashes(tmp_path):
    import hashlib

    path = checkpoint.save(tmp_path, 7, linear(), state_at(7), keep_last=2)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    for name in ("weights.safetensors", "state.pt"):
        content = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_manifest_holds_the_run_and_notices_another(tmp_path):
    run = {"config": {"seed": 1, "rate": 0.1, "off": None}, "environment": {"hashes": {"data": "abc"}}}
    path = checkpoint.save(tmp_path, 7, linear(), state_at(7), keep_last=2, run=run)
    assert read_manifest(path)["run"] == run
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(CheckpointError, match=r"manifest\.json .* is not what was written there"):
        checkpoint.verify(path)


@pytest.mark.parametrize(("format_", "reads"), [({}, True), ({"format": 1}, True), ({"format": 3}, False)])
def test_manifests_of_earlier_versions_are_read(format_, reads, tmp_path):
    path = checkpoint.save(tmp_path, 7, linear(), state_at(7), keep_last=2)
    files = json.loads((path / "manifest.json").read_text())["files"]
    (path / "manifest.json").write_text(json.dumps(format_ | {"step": 7, "files": files}))
    assert (checkpoint.newest_valid(tmp_path) == path) is reads


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("position", [0, 0.5, -1])
def test_one_flipped_bit_is_noticed(name, position, tmp_path):
    path = checkpoint.save(tmp_path, 1, linear(), state_at(1), keep_last=2)
    checkpoint.verify(path)
    content = bytearray((path / name).read_bytes())
    content[int(position * len(content)) if position > 0 else position] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(path)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_missing_or_shortened_file_is_noticed(name, damage, tmp_path):
    path = checkpoint.save(tmp_path, 1, linear(), state_at(1), keep_last=2)
    content = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(content[: len(content) // 2 if damage == "half" else 0])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(path)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"files": []}', '{"files": {}}', '{"files": null}', "\x00\xff"])
def test_a_manifest_of_something_else_is_refused(text, tmp_path):
    path = checkpoint.save(tmp_path, 1, linear(), state_at(1), keep_last=2)
    (path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError):
        checkpoint.verify(path)


# --- Comparing ---


def test_equal_names_and_shapes_compare_empty():
    assert checkpoint.compare({"a": torch.zeros(2)}, {"a": torch.ones(2)}) == []


def test_every_kind_of_difference_is_listed():
    actual = {"extra": torch.zeros(1), "same": torch.zeros(1), "shape": torch.zeros(2, 3)}
    expected = {"gone": torch.zeros(1), "same": torch.zeros(1), "shape": torch.zeros(3, 2)}
    text = "\n".join(checkpoint.compare(actual, expected))
    assert "1 tensors missing: gone" in text
    assert "1 tensors unexpected: extra" in text
    assert "shape: (2, 3) found, (3, 2) expected" in text
    assert "same" not in text


def test_long_lists_are_cut_and_counted():
    lines = checkpoint.compare({}, {f"t{i}": torch.zeros(1) for i in range(9)})
    assert len(lines) == 1
    assert "9 tensors missing: t0, t1, t2 …" in lines[0]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(3, 3), "weight: (2, 3) found, (3, 3) expected"),
        (nn.Linear(3, 2, bias=False), "unexpected: bias"),
        (nn.Bilinear(3, 2, 2), "another shape"),
        (nn.Sequential(nn.Linear(3, 2)), "missing: 0.bias, 0.weight"),
    ],
)
def test_a_checkpoint_of_another_model_changes_nothing(other, words, tmp_path):
    path = checkpoint.save(tmp_path, 1, linear(), state_at(1), keep_last=2)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, other)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


# --- Generators ---


def draw():
    return [
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.standard_normal(),  # one of a pair: the other is kept inside the generator
        random.random(),
        random.gauss(0, 1),
    ]


@pytest.mark.parametrize("drawn_before", range(3))
def test_generators_come_back_through_a_file(drawn_before, tmp_path):
    module = linear()  # made with a seed of its own: not while numbers are compared
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    for _ in range(drawn_before):
        draw()
    path = checkpoint.save(tmp_path, 1, module, state_at(1), keep_last=2)
    expected = [draw(), draw()]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    draw()
    restore_generators(checkpoint.load(path, module)["generators"][0])
    assert [draw(), draw()] == expected


def test_a_signed_file_is_read_as_it_was_or_refused_whatever_byte_is_another(tmp_path):
    path, tensors = tmp_path / "t.safetensors", {"a": torch.arange(3.0), "b": torch.ones(2, 2), "c": torch.ones(1)}
    tensors["d"] = tensors["b"]
    checkpoint.save_tensors(path, tensors, {"backbone": '{"depth": 12}'}, signed=True)
    whole, refused = path.read_bytes(), 0
    assert checkpoint.metadata(path)["backbone"] == '{"depth": 12}'
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            loaded, about = checkpoint.load_tensors(path), checkpoint.metadata(path)
        except checkpoint.CheckpointError:
            refused += 1
            continue
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        assert about["backbone"] == '{"depth": 12}'
    assert (
        len(whole) - len("crc32") - 8 <= refused < len(whole)
    )  # but in the checksum's own name, and in spaces that fill up


def test_a_file_without_a_checksum_is_taken_as_it_is(tmp_path):
    checkpoint.save_tensors(tmp_path / "t", {"a": torch.zeros(3)})
    content = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(content[:-1] + bytes([64]))
    assert checkpoint.load_tensors(tmp_path / "t")["a"].tolist() == [0, 0, 2]
