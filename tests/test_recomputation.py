"""Activation checkpointing: bit for bit what training without it gives, from blocks that are calculated twice."""

import copy

import pytest
import torch
from torch import nn

from sslctl.cli import main
from sslctl.errors import InputError
from sslctl.models.backbones import MLP, ResNet, SmallResNet, Timm
from sslctl.models.batchnorm import group_batchnorm
from sslctl.models.recomputation import blocks_of, recompute_
from sslctl.models.text_transformer import SmallTransformer
from tests.runs import MOCO, command, differences, finish, metrics, pretrain, tensors

VIT = {"patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2, "drop_path_rate": 0.4, "proj_drop_rate": 0.2}
CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}
NETWORKS = {
    "small_resnet": lambda: SmallResNet([4, 8], 1, 1, "batch", 3, 16),
    "groups": lambda: group_batchnorm(SmallResNet([4, 8], 1, 1, "batch", 3, 16), 2),
    "vit": lambda: Timm("vit_tiny_patch16_224", 3, 16, VIT),
    "rotary": lambda: Timm("vit_small_patch16_dinov3_qkvb", 3, 16, VIT),
    "convnext": lambda: Timm("convnext_atto", 3, 32, CONVNEXT),
    "texts": lambda: SmallTransformer(8, 2, 2, 0.3, 300, 6),
}
BLOCKS = {
    "small_resnet": ["layers.0", "layers.1"],
    "vit": [f"model.blocks.{block}" for block in range(3)],
    "convnext": [
        *("model.stem", "model.stages.0", "model.stages.1"),
        *("model.stages.2.downsample", "model.stages.2.blocks.0", "model.stages.2.blocks.1", "model.stages.3"),
    ],
    "texts": ["encoder.layers.0", "encoder.layers.1"],
}


def step(network, inputs):
    """The loss, gradients, buffers and next random number of a step in training mode."""
    torch.manual_seed(3)
    loss = network.train()(inputs).square().sum()
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients | dict(network.named_buffers()) | {"loss": loss.detach(), "drawn next": torch.rand(1)}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_bit_for_bit_that_of_the_plain_network(name):
    """With dropout, drop path and BatchNorm, whose statistics count a batch once."""
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    recomputed, calls = copy.deepcopy(plain), []
    block = recomputed.get_submodule(blocks_of(recomputed)[-1])
    block.register_forward_hook(lambda *_: calls.append("whole"))
    layers = [part for part in block.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    layers[1].register_forward_pre_hook(lambda *_: calls.append("part"))
    recompute_(recomputed)
    side = 32 if name == "convnext" else 16
    inputs = torch.randint(1, 300, (4, 6)) if name == "texts" else torch.rand(4, 3, side, side)
    expected = step(plain, inputs)
    assert differences(step(recomputed, inputs), expected) == []
    assert (calls.count("whole"), calls.count("part")) == (1, 2)
    calls.clear()
    with torch.no_grad():
        recomputed.eval()(inputs)
    assert calls.count("whole") == 1


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_largest_modules_of_its_layers(name):
    assert blocks_of(NETWORKS[name]()) == BLOCKS[name]
    assert len(blocks_of(ResNet(18, "auto", False, "batch", 3, 32))) == 8


def test_a_network_without_blocks_is_refused():
    with pytest.raises(InputError, match=r"MLP has no blocks .*: trainer\.activation_checkpointing=false"):
        recompute_(MLP([4, 4], 3, 2))


def test_a_run_goes_on_with_it_and_without_it_to_the_same_bits(tmp_path):
    straight = finish(tmp_path / "straight", *MOCO)
    run = tmp_path / "run"
    assert pretrain(run, *MOCO, "trainer.activation_checkpointing=true", stop_after=4) == 143
    assert differences(tensors(finish(run, *MOCO)), tensors(straight)) == []
    assert metrics(run) == metrics(straight)


def test_a_compiled_run_is_refused(tmp_path, capsys):
    words = ("trainer.activation_checkpointing=true", "trainer.compile=true")
    assert main(command(tmp_path / "run", *MOCO, *words)) == 2
    assert "trainer.compile=true chooses itself what is calculated again" in capsys.readouterr().err
