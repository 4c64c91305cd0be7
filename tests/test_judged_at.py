"""Judging at another size than that of training: what a key asks for, in proportion, by networks that take it."""

import json

import pytest
import torch
import yaml

from sslctl.config.command_line import prepare
from sslctl.data import sources
from sslctl.data.folders import FolderKeys
from sslctl.data.scale import choose_patch
from sslctl.errors import InputError
from sslctl.factory.from_config import refuse_size
from sslctl.models.backbones import MLP, Backbone, SmallResNet, Timm, describe
from sslctl.models.preprocess import Preprocess
from tests.conftest import QUICK, write_images

TRAINED = Preprocess(3, 16, 18, [0.5] * 3, [0.5] * 3)


def test_another_size_is_taken_where_a_key_asks_for_it_alone(tmp_path):
    write_images(tmp_path, count=4, size=(24, 24))
    actual, asked = (sources.folder("train", FolderKeys(str(tmp_path), size, 3, 1.0)) for size in (None, 24))
    TRAINED.refuse_other("it", asked, "dataset", judges=True)
    for source, judges in ((actual, True), (asked, False)):
        with pytest.raises(InputError, match=r"it takes 3×16×16.* has 3×24×24 images: set dataset\.image_size=16"):
            TRAINED.refuse_other("it", source, "dataset", judges=judges)
    assert (TRAINED.at(24).image_size, TRAINED.at(24).resize, TRAINED.at(16)) == (24, 27, TRAINED)


def test_a_run_is_judged_at_twice_its_size(cli, workdir):
    write_images(workdir / "images", "train/a", "train/b", count=16, size=(24, 24), seed=1)
    write_images(workdir / "images", "test/a", "test/b", count=4, size=(24, 24), seed=2)
    words = ("dataset=imagefolder", "dataset.root=images", "dataset.image_size=12")
    judged = ("eval_dataset=imagefolder", "eval_dataset.root=images", "eval_dataset.image_size=24")
    quick = [word for word in QUICK if not word.startswith("backbone")]
    network = ("backbone=small_resnet", "backbone.widths=[8]")
    result = cli("pretrain", *quick, *network, *words, *judged, "trainer.batch_size=8", "run_dir=run")
    assert result.status == 0, result.err
    assert json.loads((workdir / "run" / "preprocess.json").read_text())["image_size"] == 12
    for more, size in (((), 24), (words, 12)):
        result = cli("knn-eval", "run", *more, "cache=false")
        assert result.status == 0, result.err
        assert f"3×{size}×{size}" in result.out
    results = [json.loads(line) for line in (workdir / "run" / "results.jsonl").read_text().splitlines()]
    assert [result["preprocess"].split(",")[0] for result in results][-1] == "3×12×12"


def test_networks_that_take_one_size_only_are_refused_by_it():
    vit = Timm("vit_tiny_patch16_224", 3, 32, {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2})
    for network, size, message in (
        (MLP([8], 3, 16), 24, r"eval_dataset\.image_size=24: this backbone takes images of the size it was trained at"),
        (vit, 36, r"image_size=36: patches of 8 pixels do not divide it; 32 would do"),
    ):
        with pytest.raises(InputError, match=message):
            refuse_size(Backbone(network, [0.5] * 3, [0.5] * 3), size, "eval_dataset")
    for network, size in ((vit, 48), (SmallResNet([8, 8], 1, 0, "batch", 3, 32), 50)):
        backbone = Backbone(network, [0.5] * 3, [0.5] * 3).eval()
        refuse_size(backbone, size, "dataset")
        assert backbone(torch.rand(2, 3, size, size)).shape == (2, network.embed_dim)


# --- Patches ---


@pytest.mark.parametrize(
    ("size", "patch"),
    [(224, None), (112, None), (200, 8), (96, 8), (64, 8), (48, 4), (32, 4), (28, 4), (24, 4), (12, 2), (25, None)],
)
def test_a_vision_transformers_patch_divides_the_images_of_a_folder_often_enough(tmp_path, monkeypatch, size, patch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", count=1, size=(8, 8))
    words = ["dataset=folder", "dataset.root=images", f"dataset.image_size={size}"]
    assert choose_patch(prepare(words)) == patch


def test_the_patch_follows_most_images_unless_it_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", count=5, size=(32, 32))
    write_images(tmp_path / "images", "other", count=2, size=(33, 40))
    words = ["dataset=folder", "dataset.root=images"]
    assert choose_patch(prepare(words)) == 4
    for more in ("+backbone.kwargs.patch_size=16", "dataset.scale.patch_size=2", "experiment=small", "dataset.root=x"):
        assert choose_patch(prepare([*words, more])) is None


def test_the_patch_stands_in_the_configuration_and_the_plan(cli, workdir):
    write_images(workdir / "images", count=4, size=(32, 32))
    words = ("method=mae", "backbone=small_vit", "dataset=folder", "dataset.root=images")
    result = cli("pretrain", *words, "--cfg", "job", "--resolve")
    assert result.status == 0, result.err
    assert yaml.safe_load(result.out)["backbone"]["kwargs"]["patch_size"] == 4
    vit = Timm("vit_tiny_patch16_224", 3, 32, {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2})
    assert describe(vit) == "patches of 4 px (backbone.kwargs.patch_size)"
