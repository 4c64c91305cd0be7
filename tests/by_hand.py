"""Networks, methods and batches made by hand, without a configuration, and comparisons of what they hold."""

import functools

import torch
from omegaconf import OmegaConf

from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.data.batch import Batch
from sslctl.methods.base import Facts
from sslctl.methods.moco import MoCo
from sslctl.methods.simclr import SimCLR
from sslctl.models.backbones import Backbone, SmallResNet
from sslctl.views import Key, ViewMaker

SIDE, BATCH = 8, 6
MEAN, STD = [0.5, 0.5, 0.5], [0.3, 0.3, 0.3]


def view_settings(augmentation: str) -> dict:
    """The settings of configs/augmentation/<augmentation>.yaml, composed, in a copy that a test may change."""
    return OmegaConf.to_container(_augmentation(augmentation), resolve=True)


@functools.cache
def _augmentation(name: str):
    return compose_choices("views", Prepared(), [f"augmentation={name}"]).augmentation


def facts(**changes):
    values = {"channels": 3, "image_size": SIDE, "num_images": 60, "num_classes": 4}
    return Facts(**{**values, "batch_size": BATCH, "steps_per_epoch": 10, "total_steps": 100, **changes})


def tiny_backbone(seed=0, widths=(6, 8)):
    torch.manual_seed(seed)
    return Backbone(SmallResNet(list(widths), 1, 1, "batch", 3, SIDE), MEAN, STD)


def make_batch(count=BATCH, views=2, start=0, epoch=0):
    """Random images of the data set's places start, start + 1, … and their views."""
    index = torch.arange(start, start + count)
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(start))
    key = Key(0, epoch, index)
    settings = view_settings("moco_v2")
    settings["global"]["count"] = views
    return Batch(ViewMaker(settings, SIDE)(pixels.to(torch.uint8), key), index % 4, index, key)


def with_views(batch, views):
    return Batch({"global": views}, batch.label, batch.index, batch.key)


def moco(backbone=None, **changes):
    values = {
        "projector_layers": 2,
        "hidden_dim": None,
        "out_dim": 5,
        "queue_size": 16,
        "temperature": 0.2,
        "teacher_momentum": 0.9,
        "teacher_momentum_end": 0.9,
        "symmetric": False,
        "batchnorm_groups": 1,
    }
    backbone = backbone or tiny_backbone()
    torch.manual_seed(1)
    return MoCo(backbone, facts(), **{**values, **changes})


def simclr(**changes):
    values = {"projector_layers": 2, "hidden_dim": None, "out_dim": 5, "norm": True, "temperature": 0.5}
    backbone = tiny_backbone()
    torch.manual_seed(1)
    return SimCLR(backbone, facts(), **{**values, **changes})


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


AS_IT_IS = {"pool": "own", "layer_decay": 1.0, "classifier_lr_scale": 1.0}
