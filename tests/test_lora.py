"""LoRA: the sum of two matrices by hand, merged wherever weights are kept, exact resume, and a teacher of merged weights."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sslctl
from sslctl.cli import main
from sslctl.errors import InputError
from sslctl.evaluation import subjects
from sslctl.methods.base import ema_update, teacher_of
from sslctl.models.backbones import Timm
from sslctl.models.lora import Adapted, adapt_, merge_, merge_tensors
from sslctl.models.weights import read_weights
from sslctl.runs.checkpoint import load_tensors, save_tensors
from tests.runs import MOCO, command, differences, finish, metrics, newest, pretrain, state_of, tensors

SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def vit(seed=0, model="vit_tiny_patch16_224", channels=3, image_size=16):
    torch.manual_seed(seed)
    network = Timm(model, channels, image_size, SMALL).eval()
    for name, parameter in network.named_parameters():
        if "gamma" in name:
            nn.init.ones_(parameter)  # of 1e-5 in the beginning
    return network


def learned(network, seed=2):
    """An adapted network whose second matrices are no longer 0."""
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.2)
    return network


# --- Layers ---


def test_an_adapted_layer_is_the_papers_formula_and_only_its_matrices_learn():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    plain, x = copy.deepcopy(network), torch.randn(4, 5)
    adapt_(network, rank=2, alpha=6.0, targets=["1"])
    assert torch.equal(network(x), plain(x))  # B begins as 0
    a, b = learned(network)[1].lora_a, network[1].lora_b
    assert (a.shape, b.shape) == ((2, 7), (3, 2))
    assert 0 < a.abs().max() <= 1 / math.sqrt(7)  # the official code's uniform values
    weight = plain[1].weight + 3.0 * b @ a
    torch.testing.assert_close(network(x), F.linear(plain[0](x), weight, plain[1].bias))
    network(x).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is not None] == ["1.lora_a", "1.lora_b"]
    # Of the dense weight's gradient G: 3 Bᵀ G and 3 G Aᵀ.
    dense = weight.detach().requires_grad_()
    F.linear(plain[0](x), dense, plain[1].bias).square().sum().backward()
    torch.testing.assert_close(a.grad, 3.0 * b.detach().T @ dense.grad)
    torch.testing.assert_close(b.grad, 3.0 * dense.grad @ a.detach().T)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3_qkvb"])
def test_merged_networks_are_the_adapted_ones_also_where_attention_reads_the_weight_itself(model):
    network, plain = vit(model=model), vit(model=model)
    adapt_(network, rank=4, alpha=8.0, targets=["attn.qkv", "attn.proj"])
    adapted = [name for name, part in network.named_modules() if isinstance(part, Adapted)]
    assert adapted == [f"model.blocks.{block}.attn.{layer}" for block in (0, 1) for layer in ("qkv", "proj")]
    with torch.no_grad():
        expected = learned(network)(IMAGES)
        from_tensors = vit(3, model)
        from_tensors.load_state_dict(merge_tensors(network.state_dict(), alpha=8.0))
        merge_(network)
        assert differences(network.state_dict(), from_tensors.state_dict()) == []
        assert [name for name, _ in network.named_parameters()] == [name for name, _ in plain.named_parameters()]
        torch.testing.assert_close(network(IMAGES), expected, rtol=0, atol=1e-6)
        assert (plain(IMAGES) - expected).abs().max() > 1e-2
    assert type(network.model.blocks[0].attn.qkv) is nn.Linear


def test_a_teacher_is_the_mean_of_merged_weights():
    student = vit()
    teacher = teacher_of(student)
    before = teacher.state_dict()["model.blocks.1.attn.proj.weight"].clone()
    adapt_(student, rank=4, alpha=8.0, targets=["proj"])
    learned(student)
    for _ in range(2):
        ema_update(teacher, student, 0.75)
    merged = copy.deepcopy(student)
    merge_(merged)
    after = merged.state_dict()["model.blocks.1.attn.proj.weight"]
    expected = before + (1 - 0.75**2) * (after - before)
    torch.testing.assert_close(teacher.state_dict()["model.blocks.1.attn.proj.weight"], expected)
    qkv = "model.blocks.1.attn.qkv.weight"
    assert torch.equal(teacher.state_dict()[qkv], student.state_dict()[qkv])


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["kvq"], r"no linear layer kvq \(nearest: qkv\); it has fc1, fc2, proj, qkv"), ([], r"targets=\[\]: expected")],
)
def test_layers_that_a_network_has_not_are_refused(targets, message):
    with pytest.raises(InputError, match=message):
        adapt_(vit(), 4, 8.0, targets)


# --- Runs: one that is stopped twice, beside a straight one ---


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Of a run that adapts given weights and freezes its first block for an epoch."""
    weights = tmp_path_factory.mktemp("given") / "weights.safetensors"
    network = vit(seed=5, channels=1, image_size=8)
    save_tensors(weights, {name.removeprefix("model."): t.contiguous() for name, t in network.state_dict().items()})
    shape = [f"+backbone.kwargs.{name}={value}" for name, value in SMALL.items()]
    network = ("backbone=timm", "backbone.model=vit_tiny_patch16_224", *shape, f"backbone.weights={weights}")
    lora = ("backbone.lora={rank:4,alpha:8,targets:[qkv,fc1]}", "backbone.freeze=2", "backbone.freeze_epochs=1")
    return (*MOCO, *network, *lora, "optimizer=adamw", "optimizer.base_lr=0.02")


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory):
    return finish(tmp_path_factory.mktemp("lora") / "run", *words)


def test_a_stopped_run_equals_the_straight_one_and_its_weights_can_be_begun_with(straight, words, tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(run, *words, stop_after=4) == 143
    printed = capsys.readouterr().out
    assert "lora       rank 4, alpha 8: 4 layers (fc1, qkv): 1,728 of " in printed
    assert "frozen     the first 2 of 3 layers (" in printed
    # Before the end a run's backbone is that of its checkpoint, merged.
    stored = load_tensors(newest(run) / "weights.safetensors")
    name = "network.model.blocks.1.attn.qkv"
    a, b = stored[f"backbone.{name}.lora_a"], stored[f"backbone.{name}.lora_b"]
    begun = read_weights(run)
    assert not any("lora" in key for key in begun)
    torch.testing.assert_close(begun[f"{name}.weight"], stored[f"backbone.{name}.weight"] + 2.0 * b @ a)
    assert stored["backbone.network.model.blocks.0.attn.qkv.lora_b"].abs().max() == 0 < b.abs().max()  # still frozen
    finish(run, *words, stops=(6,))
    assert differences(tensors(run), tensors(straight)) == []
    assert metrics(run) == metrics(straight)


def test_only_the_matrices_and_the_head_have_learned(straight, words):
    stored, given = load_tensors(newest(straight) / "weights.safetensors"), load_tensors(straight / "given.safetensors")
    for name, tensor in given.items():
        assert torch.equal(stored[f"backbone.{name}"], tensor), name
    matrices = [name for name in stored if "lora" in name]
    assert len(matrices) == 8
    assert all(name.startswith("backbone.") for name in matrices)  # the teacher has plain weights
    assert all(stored[name].abs().max() > 0 for name in matrices)
    groups = state_of(newest(straight))["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == 8 + 4  # and the projector's two layers


def test_what_is_kept_and_exported_is_what_is_judged(straight, tmp_path, monkeypatch):
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    subject = subjects.trained(straight, newest(straight), None)
    backbone, _ = sslctl.load(straight)
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(straight), "format=safetensors", "out=network.safetensors"]) == 0
    exported, _ = sslctl.load(tmp_path / "network.safetensors")
    with torch.no_grad():
        judged = subject.function(images)
        given = subjects.given_to(straight, None).function(images)
        for loaded in (backbone, exported):
            torch.testing.assert_close(loaded(images), judged, rtol=0, atol=1e-6)
    assert (given - judged).abs().max() > 1e-3
    assert not any("lora" in name for name in load_tensors(straight / "backbone.safetensors"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("backbone.weights=null",),
            "backbone.lora.rank=4 adapts given weights, and there are none: backbone.weights=FILE",
        ),
        (("backbone.lora.targets=[qvk]",), "no linear layer qvk (nearest: qkv)"),
        (("backbone.lora.rank=-1",), "backbone.lora.rank=-1: expected at least 0"),
    ],
)
def test_a_command_that_cannot_adapt_is_refused(more, message, words, tmp_path, capsys):
    assert main(command(tmp_path / "run", *words, *more)) == 2
    assert message in capsys.readouterr().err


def test_given_weights_are_evaluated_as_they_are(words, tmp_path, capsys):
    network = [word for word in words if word.startswith(("backbone", "+backbone")) and "freeze" not in word]
    data = ("dataset=digits", "dataset.image_size=8", "device=cpu", "cache=false", f"out={tmp_path / 'o.jsonl'}")
    assert main(["knn-eval", *network, *data]) == 2
    said = capsys.readouterr().err
    assert (
        "backbone.lora.rank says how a pretraining (pretrain, adapt) learns; here the whole network is taken:"
        " backbone.lora.rank=0"
    ) in said
