"""Frozen parts: what they are, that nothing of them moves, and that runs resume exactly through the thaw."""

import pytest
import torch
from torch import nn

from sslctl.cli import main
from sslctl.errors import InputError
from sslctl.factory.from_run import load_method
from sslctl.methods.base import Method
from sslctl.models.backbones import MLP, Backbone, ResNet, Timm
from sslctl.models.batchnorm import calibrating
from sslctl.models.freezing import Freezing, describe_frozen, frozen_parts
from sslctl.models.vit import fix_positions_
from sslctl.runs.checkpoint import load_tensors
from tests.by_hand import facts, make_batch, moco
from tests.runs import MOCO, STEPS_PER_EPOCH, command, differences, finish, metrics, newest, pretrain, state_of, tensors

# --- Which parts ---


def vit(**changes):
    arguments = {"patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2} | changes
    return Timm("vit_tiny_patch16_224", 3, 16, arguments)


STEM, BLOCK = ("cls_token", "pos_embed", "patch_embed."), "blocks.0."


@pytest.mark.parametrize(
    ("network", "freeze", "expected"),
    [
        (vit, 1, STEM),
        (vit, 2, (*STEM, BLOCK)),
        (vit, ["blocks.0", "norm"], (BLOCK, "norm.")),
        (vit, "model.blocks.0.attn.qkv.weight", ("blocks.0.attn.qkv.weight",)),
        (lambda: ResNet(18, "auto", False, "batch", 3, 32), 3, ("conv1.", "bn1.", "layer1.0.", "layer1.1.")),
        (lambda: ResNet(18, "auto", False, "batch", 3, 32), ["layer1"], ("layer1.0.", "layer1.1.")),
        (lambda: MLP([4] * 12, 3, 2), 2, ("layers.0.", "layers.1.", "layers.3.", "layers.4.")),  # not layers.10
    ],
)
def test_layers_are_counted_from_the_input_and_names_are_the_networks_own(network, freeze, expected):
    network = network()
    parts = frozen_parts(network, freeze)
    names = [name for name, _ in network.named_parameters()]
    assert list(parts.parameters) == [n for n in names if n.removeprefix("model.").startswith(expected)]
    inside = [m for name in parts.modules for m in network.get_submodule(name).modules()]
    for name, module in network.named_modules():
        own = [n for n, _ in module.named_parameters(prefix=name)]
        assert (module in inside) == (bool(own) and set(own) <= set(parts.parameters)) or not own, name


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (5, r"backbone\.freeze=5: this network has 1 to 4 layers: backbone\.freeze=4"),
        (0, r"backbone\.freeze=0: this network has 1 to 4 layers"),
        ("block.0", r"backbone\.freeze=block\.0: this network has no part of that name \(nearest: blocks\.0\)"),
        (["norm", "blocks.7"], r"backbone\.freeze=blocks\.7: .*\(nearest: blocks\.\d\)"),
        ([], r"backbone\.freeze=\[\]: expected a name"),
    ],
)
def test_what_the_network_has_not_is_refused_with_the_nearest_word(freeze, message):
    with pytest.raises(InputError, match=message):
        frozen_parts(vit(), freeze)


def test_layers_of_a_network_that_does_not_say_them_are_frozen_by_name():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    assert frozen_parts(network, ["0"]).parameters == ("0.weight", "0.bias")
    with pytest.raises(InputError, match=r"does not say what its layers are .*: backbone\.freeze=\[NAME,…\]"):
        frozen_parts(network, 1)


def test_the_plan_says_what_is_frozen_and_how_much_of_it():
    network = vit(depth=1)
    assert describe_frozen(network, 1) == (
        "the first 1 of 2 layers (patch_embed, cls_token, pos_embed): 536 of 1,424 parameters"
    )
    assert describe_frozen(network, ["norm"]) == "norm: 16 of 1,424 parameters"


# --- One step ---


def test_frozen_parts_have_no_gradient_and_keep_their_statistics_in_the_teacher_too():
    method = moco().train()
    freezing = Freezing(method, 2, until=3)
    freezing.at(0)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method(make_batch(), {"teacher_momentum": 0.5})["loss"].backward()
    inside = ("network.conv1.", "network.bn1.", "network.layers.0.")
    for name, parameter in method.backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(inside), name
    for name, tensor in method.state_dict().items():
        if name.endswith("num_batches_tracked"):
            frozen = name.partition(".")[2].startswith(inside)
            assert torch.equal(tensor, before[name]) == frozen, name
    freezing.at(3)
    assert all(part.training for part in method.modules())
    assert all(p.requires_grad for p in method.backbone.parameters())
    assert not any(p.requires_grad for p in method.teacher_backbone.parameters())


def test_training_and_evaluating_modes_in_between_leave_frozen_parts_as_they_are():
    method = moco().train()
    Freezing(method, ["bn1"], until=None).at(0)
    for part in (method, method.backbone, method.teacher_backbone):
        part.eval().train()
        assert not method.backbone.network.bn1.training
        assert not method.teacher_backbone.network.bn1.training
        assert method.backbone.network.layers[0].bn1.training
    with torch.no_grad(), calibrating(method):
        method.backbone(torch.rand(4, 3, 8, 8))
    assert method.backbone.network.bn1.num_batches_tracked == 0
    assert method.backbone.network.layers[0].bn1.num_batches_tracked == 1


def test_what_a_method_keeps_fixed_itself_stays_so_after_the_thaw():
    backbone = Backbone(vit(), [0.5] * 3, [0.3] * 3)
    fix_positions_(backbone)
    freezing = Freezing(Method(backbone, facts()), 1, until=1)
    for step, learns in ((0, False), (1, True)):
        freezing.at(step)
        assert backbone.network.model.cls_token.requires_grad == learns
        assert not backbone.network.model.pos_embed.requires_grad


# --- Runs ---

FROZEN = (*MOCO, "backbone.freeze=2", "optimizer=adamw", "trainer.save_every_steps=1000")
THAWED = (*FROZEN, f"backbone.freeze_epochs={4 / STEPS_PER_EPOCH}")  # learns from step 4 on
PARTS = ("network.conv1.", "network.bn1.", "network.layers.0.")


@pytest.fixture(scope="module")
def thawed(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("thawed") / "run", *THAWED)


def frozen_part_of(run, network):
    """Tensors of the frozen parts in the newest checkpoint."""
    stored = load_tensors(newest(run) / "weights.safetensors")
    names = [name for name in stored if name.startswith(tuple(f"{network}.{part}" for part in PARTS))]
    assert len(names) > 10
    return {name.removeprefix(network): stored[name] for name in names}


def test_a_run_stopped_before_at_and_after_the_thaw_equals_the_straight_one(thawed, tmp_path):
    run = tmp_path / "run"
    initial, states = None, {}
    for stop in (3, 4, 6):
        assert pretrain(run, *THAWED, stop_after=stop) == 143
        now, states[stop] = frozen_part_of(run, "backbone"), len(state_of(newest(run))["optimizer"]["state"])
        initial = initial or now
        assert (differences(now, initial) == []) == (stop <= 4), stop
        assert (differences(frozen_part_of(run, "teacher_backbone"), initial) == []) == (stop <= 4), stop
    assert states[3] == states[4] < states[6]  # no state for what does not learn
    finish(run, *THAWED)
    assert differences(tensors(run), tensors(thawed)) == []
    assert metrics(run) == metrics(thawed)


def test_parts_that_never_learn_stay_whatever_the_weight_decay_and_have_no_optimizer_state(thawed, tmp_path, capsys):
    words = (*FROZEN, "optimizer.weight_decay=0.5", "trainer.epochs=1")
    run = finish(tmp_path / "run", *words)
    printed = capsys.readouterr().out
    assert "frozen     the first 2 of 3 layers (conv1, bn1, layers.0): " in printed
    assert "to the end, with random weights" in printed
    learned = load_tensors(newest(run) / "weights.safetensors")
    begun = load_tensors(newest(thawed) / "weights.safetensors")  # of the same seed
    assert learned["backbone.network.bn1.num_batches_tracked"] == 0
    assert not torch.equal(learned["backbone.network.conv1.weight"], begun["backbone.network.conv1.weight"])
    assert differences(frozen_part_of(run, "backbone"), frozen_part_of(run, "teacher_backbone")) == []
    groups = state_of(newest(run))["optimizer"]["param_groups"]
    trained = sum(not name.startswith(tuple(f"backbone.{p}" for p in PARTS)) for name in learned_names(run))
    assert sum(len(group["params"]) for group in groups) == trained


def learned_names(run):
    """Parameters that learn where nothing is frozen."""
    return [name for name, parameter in load_method(run).named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("backbone.freeze=9",), "backbone.freeze=9: this network has 1 to 3 layers: backbone.freeze=3"),
        (("backbone.freeze=conv2",), "no part of that name (nearest: conv1)"),
        (
            ("backbone.freeze=true",),
            "backbone.freeze=True: expected a whole number or a word or a list of words or null",
        ),
        (("backbone.freeze_epochs=1",), "backbone.freeze_epochs=1: of which parts? backbone.freeze=2 or names"),
        (("backbone.freeze=1", "backbone.freeze_epochs=0"), "backbone.freeze_epochs=0: expected more than 0"),
    ],
)
def test_a_command_that_freezes_what_cannot_be_is_refused(words, message, tmp_path, capsys):
    assert main(command(tmp_path / "run", *MOCO, *words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
