"""Mean, std, size and interpolation of given weights: as their file, timm or torchvision say them."""

import json
import socket
import types

import pytest
import timm
import torch
from omegaconf import OmegaConf

from sslctl.errors import InputError
from sslctl.factory.backbone_file import save_backbone
from sslctl.factory.expectation import as_expected, expectation_of
from sslctl.factory.from_config import build_backbone
from sslctl.models.backbones import Backbone, SmallResNet
from sslctl.models.preprocess import Preprocess

OWN = Preprocess(3, 32, 32, [0.4, 0.4, 0.4], [0.2, 0.2, 0.2])
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


def timm_node(model, **more):
    return OmegaConf.create({"_target_": "sslctl.models.backbones.Timm", "model": model, "kwargs": {}} | more)


def touched(path):
    path.touch()
    return str(path)


@pytest.mark.parametrize(
    ("model", "file", "expected"),
    [
        ("tf_efficientnet_lite0", "mine.safetensors", (*HALF, 224, "bicubic")),  # it has one set of weights
        ("vit_small_patch16_224", "dino_deitsmall16_pretrain.pth", (*IMAGENET, 224, "bicubic")),
        ("vit_small_patch16_224.dino", "mine.pth", (*IMAGENET, 224, "bicubic")),
        ("vit_small_patch16_224.augreg_in21k", "mine.pth", (*HALF, 224, "bicubic")),
        ("vit_small_patch16_224", "mine.pth", None),  # DINO's have other values than AugReg's
    ],
)
def test_timm_says_what_its_weights_expect(model, file, expected, tmp_path):
    stated = expectation_of(timm_node(model, weights=touched(tmp_path / file).replace("safetensors", "pth")))
    assert (stated and (stated.mean, stated.std, stated.size, stated.interpolation)) == expected


def test_torchvisions_files_are_known_by_name(tmp_path):
    node = {"_target_": "sslctl.models.backbones.ResNet", "depth": 50}
    stated = expectation_of(OmegaConf.create(node | {"weights": touched(tmp_path / "resnet50-11ad3fa6.pth")}))
    assert (stated.mean, stated.std, stated.size, stated.interpolation) == (*IMAGENET, 224, "bilinear")
    assert expectation_of(OmegaConf.create(node | {"weights": touched(tmp_path / "mine.pth")})) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "config.json",
            {
                "pretrained_cfg": {
                    "mean": [0.1] * 3,
                    "std": [0.3] * 3,
                    "input_size": [3, 64, 64],
                    "interpolation": "bicubic",
                }
            },
        ),
        (
            "preprocessor_config.json",
            {"image_mean": [0.1] * 3, "image_std": [0.3] * 3, "crop_size": {"height": 64}, "resample": 3},
        ),
        ("preprocessor_config.json", {"image_mean": [0.1] * 3, "image_std": [0.3] * 3, "size": 64, "resample": 3}),
    ],
)
def test_the_hubs_files_beside_the_weights_are_read(name, content, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    node = timm_node("vit_small_patch16_224", weights=touched(tmp_path / "model.pth"))
    stated = expectation_of(node)
    assert (stated.mean, stated.std, stated.size, stated.interpolation) == ((0.1,) * 3, (0.3,) * 3, 64, "bicubic")
    seen, sentence = as_expected(OWN, node)
    assert (seen.mean, seen.std) == ([0.1] * 3, [0.3] * 3)
    assert sentence.startswith("mean [0.1, 0.1, 0.1], std [0.3, 0.3, 0.3] of the weights")
    assert f"{name} beside the file; trained at 64 px, bicubic; here images are resized bilinearly" in sentence
    seen, sentence = as_expected(OWN, OmegaConf.merge(node, {"normalization": "dataset"}))
    assert seen == OWN
    assert "of the dataset, not those of the weights" in sentence
    for broken in ("{", "[]", '{"image_mean": [1, "a"]}', '{"image_mean": [1], "image_std": [0]}'):
        (tmp_path / name).write_text(broken)
        assert expectation_of(node) is None


@pytest.mark.parametrize(
    "content",
    [
        '{"image_mean": [0.5], "image_std": [NaN]}',
        '{"image_mean": [127.5, 127.5, 127.5], "image_std": [127.5, 127.5, 127.5]}',
        '{"image_mean": [], "image_std": []}',
        '{"image_mean": [0.5], "image_std": [0.5], "do_normalize": false}',
        '{"image_mean": [0.5], "image_std": [0.5], "size": 1e400}',
        "[" * 100_000,
    ],
)
def test_what_normalises_no_image_in_files_beside_the_weights_is_passed_over(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(content)
    assert expectation_of(timm_node("vit_small_patch16_224", weights=touched(tmp_path / "model.pth"))) is None


def test_weights_that_say_nothing_take_the_datasets_and_it_is_said(tmp_path):
    node = timm_node("vit_small_patch16_224", weights=touched(tmp_path / "mine.pth"))
    seen, sentence = as_expected(OWN, node)
    assert seen == OWN
    assert "the weights do not say theirs" in sentence
    with pytest.raises(InputError, match="normalization=weights: the weights do not say it"):
        as_expected(OWN, OmegaConf.merge(node, {"normalization": "weights"}))


def test_the_normalisation_of_weights_is_refused_where_there_are_none():
    node = timm_node("vit_small_patch16_224", weights=None)
    for choice in (None, "dataset"):
        assert as_expected(OWN, OmegaConf.merge(node, {"normalization": choice})) == (OWN, None)
    with pytest.raises(InputError, match="normalization=weights: there are none"):
        as_expected(OWN, OmegaConf.merge(node, {"normalization": "weights"}))


def test_grey_images_take_the_average_and_other_channels_the_datasets(tmp_path):
    node = timm_node("resnet18.tv_in1k", weights=touched(tmp_path / "mine.pth"))
    grey, _ = as_expected(Preprocess(1, 32, 32, [0.4], [0.2]), node)
    assert grey.mean == pytest.approx([sum(IMAGENET[0]) / 3])
    four = Preprocess(4, 32, 32, [0.4] * 4, [0.2] * 4)
    seen, sentence = as_expected(four, node)
    assert seen == four
    assert "the weights have 3 channels" in sentence


def test_an_sslctl_file_says_it_itself(tmp_path):
    network = SmallResNet([6, 8], 1, 1, "batch", 3, 16)
    save_backbone(tmp_path / "own.safetensors", Backbone(network, *HALF), {}, Preprocess(3, 16, 16, *map(list, HALF)))
    node = {"_target_": "sslctl.models.backbones.SmallResNet", "widths": [6, 8], "blocks": 1, "stem_stride": 1}
    node = OmegaConf.create(node | {"norm": "batch", "weights": str(tmp_path / "own.safetensors")})
    seen, sentence = as_expected(OWN, node)
    assert (seen.mean, seen.std) == tuple(map(list, HALF))
    assert "the file; trained at 16 px" in sentence
    # Its mean is among its tensors; the dataset's, when it is asked for, takes their place.
    assert build_backbone(node, OWN).mean.flatten().tolist() == [0.5] * 3
    asked = OmegaConf.merge(node, {"normalization": "dataset"})
    torch.testing.assert_close(build_backbone(asked, OWN).mean.flatten(), torch.full((3,), 0.4))


def test_weights_come_from_the_hub_by_the_models_name(monkeypatch):
    torch.manual_seed(5)
    theirs, create = timm.create_model("test_vit").eval(), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: theirs if k.get("pretrained") else create(*a, **k))
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: types.SimpleNamespace(close=lambda: None))
    node = timm_node("test_vit", pretrained=True)
    seen, _ = as_expected(Preprocess(3, 160, 160, *map(list, HALF)), node)
    assert seen.std == pytest.approx(list(timm.get_pretrained_cfg("test_vit").std))
    backbone, images = build_backbone(node, seen).eval(), torch.rand(2, 3, 160, 160)
    theirs.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), theirs(backbone.normalize(images)))


def test_without_a_network_the_hub_is_not_waited_for(monkeypatch, tmp_path):
    from huggingface_hub import constants

    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"timm/test_vit\.r160_in1k is neither reachable nor in the Hub's cache here"):
        build_backbone(timm_node("test_vit", pretrained=True), OWN)
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="both name weights"):
        build_backbone(timm_node("test_vit", pretrained=True, weights="a.pth"), OWN)
