"""The contract of a network: what every built-in one has, and that a user's own needs no more."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sslctl.config import targets
from sslctl.config.schema import CONFIGS
from sslctl.data.modality import Modality
from sslctl.errors import InputError
from sslctl.factory.from_config import build_backbone, modality_of
from sslctl.models.backbones import describe
from sslctl.models.layer_decay import layer_depths
from sslctl.models.network import Network, NetworkOptions
from sslctl.models.preprocess import Preprocess, TextPreprocess
from tests.methods import composed

IMAGES_OF_16, TEXTS_OF_16 = Preprocess(3, 16, 16, [0.5] * 3, [0.3] * 3), TextPreprocess(300, 16, "")
OPTIONS = ("modality", "fixed_size", "stem", "feature_map", "with_map", "layer_names")
OWN = {"timm": ("backbone.model=resnet18",)}  # words that a choice is nothing without


class Minimal(nn.Module):
    """What `Network` asks for, and nothing else."""

    def __init__(self, width: int, channels: int, image_size: int):
        super().__init__()
        self.embed_dim = width
        self.layer = nn.Conv2d(channels, width, 3)

    def forward(self, x):
        return self.layer(x).mean((2, 3))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "backbone").glob("*.yaml")))
def test_every_built_in_network_has_what_the_contract_asks_for(name):
    node = composed(f"backbone={name}", *OWN.get(name, ())).backbone
    preprocess = TEXTS_OF_16 if name == "small_transformer" else IMAGES_OF_16
    network = build_backbone(node, preprocess).network.eval()
    assert isinstance(network, Network)
    assert modality_of(network) == preprocess.modality
    x = preprocess.noise(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert network(x).shape == (2, network.embed_dim)
    depths, classifier = layer_depths(network)
    assert min(depths.values()) == 0
    assert max(depths.values()) <= classifier
    kinds = {"fixed_size": bool, "stem": str, "modality": Modality}
    assert all(isinstance(getattr(network, option), kind) for option, kind in kinds.items() if hasattr(network, option))


def test_the_options_are_those_that_are_written_down():
    members = NetworkOptions.__annotations__.keys() | vars(NetworkOptions).keys()
    assert {name for name in members if not name.startswith("_")} == set(OPTIONS)


def test_a_users_network_needs_no_more_than_the_contract(monkeypatch):
    monkeypatch.setattr(targets, "_allowed", [*targets._allowed, "tests"])
    node = OmegaConf.create({"_target_": "tests.test_network.Minimal", "width": 8})
    backbone = build_backbone(node, IMAGES_OF_16)
    assert isinstance(backbone.network, Network)
    assert not any(hasattr(backbone.network, option) for option in OPTIONS)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone(images), backbone.network((images - 0.5) / backbone.std))
    assert describe(backbone.network) == "as the model defines it"
    with pytest.raises(ValueError, match="Minimal has no feature map"):
        backbone.feature_map(images)
    with pytest.raises(ValueError, match="Minimal has no features of places"):
        backbone.with_map(images)
    with pytest.raises(InputError, match="Minimal does not say what its layers are"):
        layer_depths(backbone.network)
    with pytest.raises(InputError, match="Minimal takes images, the dataset has texts: backbone=small_transformer"):
        build_backbone(node, TEXTS_OF_16)
