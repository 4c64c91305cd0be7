"""Distillation of features: places of any network, teachers of timm by name, what is left out and what is refused."""

import socket
import types

import pytest
import timm
import torch
from omegaconf import OmegaConf

from sslctl.errors import InputError
from sslctl.factory.teacher import load_teacher, save_teacher
from sslctl.methods.distill import Distill
from sslctl.models.backbones import MLP, Backbone, ResNet, Timm
from sslctl.models.preprocess import Preprocess
from sslctl.models.teacher import Teacher
from tests.by_hand import facts, make_batch, tiny_backbone

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
COLOUR = Preprocess(3, 32, 32, MEAN, STD)
SETTINGS = {"loss": "cosine", "weight": 1.0, "patch_loss": "cosine", "patch_weight": 1.0, "queue_size": 12}
SETTINGS |= {"temperature": 0.1, "head_layers": 1, "hidden_dim": 6}


def distill(backbone=None, teacher=None, size=8, **changes):
    its = Preprocess(3, size, size, MEAN, STD)
    frozen = Teacher(teacher or tiny_backbone(seed=1), {}, its)
    return Distill(backbone or tiny_backbone(), facts(image_size=size), teacher=frozen, **SETTINGS | changes)


def of_timm(model, size=32, **kwargs):
    torch.manual_seed(0)
    return Backbone(Timm(model, 3, size, kwargs), MEAN, STD)


SWIN = {"depths": (1, 1), "embed_dim": 16, "window_size": 2, "num_heads": (2, 2)}
CONVOLUTIONS = ("small_resnet", "resnet18", "wider behind the pooling")
NETWORKS = {
    "small_resnet": (tiny_backbone, 8, (8, 4, 4)),
    "resnet18": (lambda: Backbone(ResNet(18, "small", False, "batch", 3, 32), MEAN, STD), 32, (512, 4, 4)),
    "class and register tokens": (
        lambda: of_timm("vit_tiny_patch16_224", patch_size=8, depth=1, reg_tokens=2),
        32,
        (192, 4, 4),
    ),
    "mean of the patches": (
        lambda: of_timm("vit_tiny_patch16_224", patch_size=16, depth=1, global_pool="avg", class_token=False),
        32,
        (192, 2, 2),
    ),
    "Eva": (lambda: of_timm("test_vit3", patch_size=8), 32, (96, 4, 4)),
    "wider behind the pooling": (lambda: of_timm("mobilenetv3_small_050"), 64, (288, 2, 2)),
    "channels last": (
        lambda: of_timm("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=16, window_size=2),
        32,
        (32, 4, 4),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_pooled_features_and_those_of_places_come_from_one_forward(name):
    make, size, shape = NETWORKS[name]
    backbone = make().eval()
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled, places = backbone.with_map(images)
        torch.testing.assert_close(pooled, backbone(images))
        assert places.shape[1:] == shape
        if name not in CONVOLUTIONS:  # a patch's features change most where the patch does
            images[:, :, :4, -4:] = 0  # in the first row, the last column
            difference = (backbone.with_map(images)[1] - places).norm(dim=1).mean(0)  # (h, w)
            assert difference.argmax() == shape[2] - 1


def test_networks_without_places_learn_by_pooled_features_alone():
    mlp = Backbone(MLP([6], 3, 8), MEAN, STD)
    for method, who in (
        (distill(mlp), "student"),
        (distill(teacher=mlp), "teacher"),
        (distill(mlp, mlp), "student and the teacher"),
    ):
        assert method.notes() == [f"without features of patches: the {who} has none"]
        assert "patch_agreement" not in method.train()(make_batch(), {})
        assert method.uninformative_loss() == 1
    (note,) = distill().notes()
    assert note == "with features of patches, on the teacher's grid: method.patch_weight=0 leaves them out"
    assert distill(patch_weight=0.0).notes() == []
    assert distill().uninformative_loss() == 2
    assert distill(loss="mse", weight=0.0).uninformative_loss() == 1
    assert distill(loss="queue").uninformative_loss() is distill(patch_loss="mse").uninformative_loss() is None
    assert distill().backbone.training  # which was looked at in evaluation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "l1"}, "expected queue, cosine or mse"),
        ({"patch_loss": "queue"}, "expected cosine or mse"),
        ({"weight": 0.0, "patch_weight": 0.0}, "leaves nothing to learn"),
    ],
)
def test_what_cannot_be_learnt_by_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        distill(**changes)


def test_heads_of_several_layers_have_their_width():
    method = distill(head_layers=3)
    widths = [
        (layer.in_features, layer.out_features) for layer in method.patch_projector if hasattr(layer, "in_features")
    ]
    assert widths == [(8, 6), (6, 6), (6, 8)]


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    teacher = tiny_backbone(seed=1)
    method = distill(tiny_backbone(seed=1), teacher, loss="queue", patch_loss="mse").eval()
    for head in (method.projector, method.patch_projector):
        with torch.no_grad():
            head[0].weight.copy_(torch.eye(8))
            head[0].bias.zero_()
    output = method(make_batch(), {})
    assert output["loss"].item() == pytest.approx(0, abs=1e-6)
    assert (output["agreement"].item(), output["patch_agreement"].item()) == pytest.approx((1, 1))


# --- Teachers of timm ---


@pytest.fixture
def hub(monkeypatch):
    """Weights of a model that timm would download."""
    torch.manual_seed(5)
    theirs, create = timm.create_model("test_vit").eval(), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: theirs if k.get("pretrained") else create(*a, **k))
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: types.SimpleNamespace(close=lambda: None))
    return theirs


NODE = {"_target_": "sslctl.models.backbones.Timm", "model": "test_vit", "kwargs": {"img_size": 160}, "weights": None}
NODE |= {"partial": False, "pretrained": True, "normalization": None, "resample_patches": False}


def test_a_teacher_may_be_timms_by_name_and_is_kept_with_the_run(hub, tmp_path):
    teacher = load_teacher(None, OmegaConf.create(NODE), COLOUR)
    assert teacher.network.mean.flatten().tolist() == pytest.approx(list(timm.get_pretrained_cfg("test_vit").mean))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_teacher(teacher, tmp_path)  # and so when the run goes on, without the Hub
    again = load_teacher(str(tmp_path / "teacher.safetensors"), None, COLOUR)
    assert torch.equal(teacher(images), again(images))
    assert torch.equal(teacher.with_map(images)[1], again.with_map(images)[1])
    with pytest.raises(InputError, match="both name weights: leave one out"):
        load_teacher(str(tmp_path / "teacher.safetensors"), OmegaConf.create(NODE), COLOUR)
    with pytest.raises(InputError, match=r"method\.teacher_backbone cannot take views of 30 pixels"):
        teacher.refuse_size(30, None)
