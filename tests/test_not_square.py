"""Images that are not square: dataset.image_size=[height,width], from the views to the files that a run leaves."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from safetensors.torch import save_file

import sslctl
from sslctl.config.command_line import prepare
from sslctl.data import sources
from sslctl.data.folders import FolderKeys
from sslctl.data.scale import choose_patch
from sslctl.errors import InputError
from sslctl.factory.from_config import refuse_size
from sslctl.models.backbones import MLP, Backbone, ResNet, SmallResNet, Timm
from sslctl.models.preprocess import Preprocess, preprocess_from
from sslctl.models.weights import load_weights
from sslctl.ops.image_size import as_key, image_size_of, in_words
from sslctl.views import Key, ViewMaker
from sslctl.views.blur import kernel_size
from sslctl.views.maker import resize_and_crop
from sslctl.views.resample import crop_boxes, cut_image, resample
from tests.conftest import QUICK, write_images
from tests.methods import built
from tests.test_config import choices
from tests.test_views import MIXED, floats, pixels, random_boxes

SQUARES_ONLY = {"rotation", "jigsaw", "relative_patch", "cpc"}
OF_PIXELS = [name for name in choices("method") if name not in ("masked_language", "frame_order")]


def test_a_size_is_a_number_or_two_sides():
    assert [image_size_of(value) for value in (32, [32], [32, 48], (48, 48))] == [32, 32, (32, 48), 48]
    assert (in_words((32, 48)), as_key((32, 48)), in_words(32), as_key(32)) == ("32×48", "[32,48]", "32", "32")
    for value in ([], [1, 2, 3], [32, 0], [32, 4.5], [True, 2]):
        with pytest.raises(InputError, match=r"image_size=.*expected a number of pixels, or \[height,width\]"):
            image_size_of(value)


# --- Views ---


def test_crops_are_resampled_to_any_shape_as_torchvision_does():
    images, boxes = floats(6, 3, 45, 61), random_boxes(6, 45, 61, seed=1)
    actual = resample(images, boxes, (12, 30), "bilinear")
    for image, (top, left, height, width), crop in zip(images, boxes.tolist(), actual, strict=True):
        expected = TF.resized_crop(image, top, left, height, width, [12, 30], antialias=True).clamp(0, 1)
        torch.testing.assert_close(crop, expected, atol=1e-5, rtol=0)
        alone = cut_image(image, [top, left, height, width], (12, 30), "bilinear", False)
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)


def test_a_crop_is_stretched_as_much_as_where_views_are_squares():
    index = torch.arange(4000)
    sides = torch.full((4000,), 300), torch.full((4000,), 600)
    boxes = crop_boxes(Key(0, 0, index), "a", *sides, (0.1, 0.3), (3 / 4, 4 / 3), 2.0)
    stretched = boxes[:, 3] / boxes[:, 2] / 2
    assert stretched.min() > 0.74
    assert stretched.max() < 1.35
    assert stretched.log().mean().abs() < 0.01
    # The whole image is the crop where it has the shape of the views, whatever cannot be drawn.
    whole = crop_boxes(Key(0, 0, index[:1]), "a", sides[0][:1], sides[1][:1], (2.0, 3.0), (1.0, 1.0), 2.0)
    assert whole.tolist() == [[0, 0, 300, 600]]


def test_views_have_the_shape_of_the_images_and_the_same_values_in_both_ways():
    maker, key = ViewMaker(MIXED, (20, 48), multiple=4), Key(3, 1, torch.arange(5))
    assert maker.sizes() == {"global": (2, (20, 48)), "local": (3, (8, 24))}
    images = pixels(5, 3, 20, 48)
    together, apart = maker(images, key), maker.finish(maker.cut(list(images), key), key)
    for group, (count, size) in maker.sizes().items():
        assert together[group].shape == (count, 5, 3, *size)
        assert (together[group] - apart[group]).abs().mean() < 0.01
    assert kernel_size(20) != kernel_size(48)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (37, 37), (20, 48), (23, 200)])
def test_the_whole_shape_is_cut_out_of_the_middle(height, width):
    image = pixels(1, 3, height, width)[0]
    actual = resize_and_crop(image, (20, 48), 25)
    scale = max(25 / height, 60 / width)
    resized = TF.resize(image, [max(25, int(height * scale)), max(60, int(width * scale))], antialias=True)
    expected = TF.center_crop(resized, [20, 48])
    assert actual.shape == (3, 20, 48)
    assert (actual.int() - expected.int()).abs().max() <= 1


# --- Networks and methods ---


def test_networks_take_them():
    vit = Timm("vit_tiny_patch16_224", 3, (32, 48), {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2})
    assert (vit.model.patch_embed.grid_size, vit.model.pos_embed.shape) == ((4, 6), (1, 25, 32))
    small = SmallResNet([8, 8], 1, 0, "batch", 3, (32, 200))
    assert small.stem == SmallResNet([8, 8], 1, 0, "batch", 3, 32).stem  # by the shorter side
    assert ResNet(18, "auto", False, "batch", 3, (64, 300)).stem == "3×3, no max-pool"
    for network in (vit, small, MLP([8], 3, (32, 48))):
        assert network.eval()(torch.rand(2, 3, 32, 48)).shape == (2, network.embed_dim)
    with pytest.raises(ValueError, match="patches of 8 pixels do not divide images of 32×44"):
        Timm("vit_tiny_patch16_224", 3, (32, 44), {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2})
    backbone = Backbone(vit, [0.5] * 3, [0.5] * 3)
    refuse_size(backbone, (48, 32), "dataset")
    with pytest.raises(InputError, match=r"dataset\.image_size=\[36,20\]: patches of 8 .*; \[32,16\] would do"):
        refuse_size(backbone, (36, 20), "dataset")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OF_PIXELS if name not in SQUARES_ONLY])
def test_a_method_learns_from_them(name):
    words = ("method.mask_size=8",) if name == "simmim" else ()
    its = built(name, *words, size=(16, 24))
    losses = [float(its.step()["loss"].detach()) for _ in range(2)]
    assert all(np.isfinite(losses))
    assert losses[0] != losses[1]
    its.method.eval()
    with torch.no_grad():
        assert all(
            values.ndim == 2
            for values in its.method.features(torch.rand(2, *its.batch.views["global"].shape[2:])).values()
        )
        assert all(image.shape[0] == 8 for image in its.method.pictures(its.batch).values())


@pytest.mark.parametrize("name", sorted(SQUARES_ONLY))
def test_a_method_that_lays_out_a_square_refuses_others(name):
    with pytest.raises(
        InputError, match=r"takes square images only, dataset\.image_size=\[16,24\]: dataset\.image_size=16"
    ):
        built(name, size=(16, 24))


def vit(size):
    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return Backbone(Timm("vit_tiny_patch16_224", 1, size, kwargs), [0.5], [0.5])


def test_positions_of_as_many_patches_in_another_shape_are_resampled(tmp_path):
    """4×16 patches are as many as 8×8: what the files of a run say of its images tells them apart."""
    torch.manual_seed(0)
    for size, other in (((16, 64), 32), (32, (16, 64))):
        given, names = vit(size), tmp_path / "given.safetensors"
        preprocess = Preprocess(1, size, 16, [0.5], [0.5])
        save_file(given.state_dict(), names, metadata={"preprocess": json.dumps(asdict(preprocess))})
        same, others = vit(size), vit(other)
        assert "resampled" not in load_weights(same, str(names), partial=False)
        assert torch.equal(same.network.model.pos_embed, given.network.model.pos_embed)
        grids = {32: "8×8", (16, 64): "4×16"}
        sentence = f"positions of {grids[size]} patches resampled to {grids[other]}"
        assert sentence in load_weights(others, str(names), partial=False)
        assert not torch.equal(others.network.model.pos_embed, given.network.model.pos_embed)


# --- Folders, runs and files ---


def test_preprocess_says_the_shape_and_comes_back():
    trained = Preprocess(3, (20, 48), 23, [0.5] * 3, [0.5] * 3)
    assert trained.summary() == "3×20×48, shorter side to 23, central part"
    assert preprocess_from(json.loads(json.dumps(vars(trained)))) == trained
    assert (trained.at((40, 96)).resize, trained.at((40, 96)).image_size) == (46, (40, 96))
    assert trained.example(torch.device("cpu")).shape == (2, 3, 20, 48)


def test_a_folder_is_seen_in_the_shape_that_is_asked_for(tmp_path):
    write_images(tmp_path, count=3, size=(40, 60))
    as_they_are = sources.folder("train", FolderKeys(str(tmp_path), [40, 60], 3, 1.0))
    assert as_they_are.all_of_one_size
    assert as_they_are.summary() == "3 images of 3×40×60"
    assert not sources.folder("train", FolderKeys(str(tmp_path), [20, 60], 3, 1.0)).all_of_one_size
    assert sources.folder("train", FolderKeys(str(tmp_path), [20, 20], 3, 1.0)).image_size == 20
    said = "images are cut to squares of 20; dataset.image_size=[height,width] sees their whole shape"
    for size, lines in ((20, [said]), ([20, 30], []), ([20, 60], [])):
        source = sources.folder("train", FolderKeys(str(tmp_path), size, 3, 1.0))
        assert [line for line in source.data_lines() if "whole shape" in line] == lines
    with pytest.raises(InputError, match=r"dataset\.image_size=\[20, 20, 3\]: expected a number"):
        sources.folder("train", FolderKeys(str(tmp_path), [20, 20, 3], 3, 1.0))


def test_the_patch_divides_both_sides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", count=1, size=(8, 8))
    for size, patch in (("[112,224]", None), ("[112,200]", 8), ("[32,96]", 4)):
        assert choose_patch(prepare(["dataset=folder", "dataset.root=images", f"dataset.image_size={size}"])) == patch


@pytest.mark.slow
def test_a_run_is_trained_judged_exported_and_loaded(cli, workdir):
    write_images(workdir / "images", "train/a", "train/b", count=16, size=(20, 30), seed=1)
    write_images(workdir / "images", "test/a", "test/b", count=4, size=(20, 30), seed=2)
    words = ("dataset=imagefolder", "dataset.root=images")
    quick = [word for word in QUICK if not word.startswith("backbone")]
    network = ("backbone=small_resnet", "backbone.widths=[8]")
    result = cli(
        "pretrain", *quick, *network, *words, "dataset.image_size=[12,18]", "trainer.batch_size=8", "run_dir=run"
    )
    assert result.status == 0, result.err
    assert "32 images of 3×12×18" in result.out
    assert "global of 12×18 px" in result.out
    assert json.loads((workdir / "run" / "preprocess.json").read_text())["image_size"] == [12, 18]
    # Judged as it was trained, at another shape, and refused where the command names a size that it has not got.
    for more, size in (
        ((), "12×18"),
        (("dataset.image_size=[24,20]",), "24×20"),
        (("dataset.image_size=16",), "16×16"),
    ):
        result = cli("knn-eval", "run", *words, *more, "cache=false")
        assert result.status == 0, result.err
        assert f"3×{size}" in result.out
    # New images, by the classifier that the evaluation kept.
    result = cli("predict", "run", "dataset=folder", "dataset.root=images/test/a", "out=new.csv")
    assert result.status == 0, result.err
    assert len((workdir / "new.csv").read_text().splitlines()) == 5
    # Outside: the description's own lines give what sslctl.load gives.
    result = cli("export", "run", "format=torch_export", "out=net.pt2")
    assert result.status == 0, result.err
    text = (
        (workdir / "net.md").read_text() if (workdir / "net.md").exists() else next(workdir.glob("net*.md")).read_text()
    )
    code = text.split("```python\n")[1].split("```")[0]
    space: dict = {}
    exec(code.split("model =")[0], space)  # the lines that make an input
    image = Image.open(next((workdir / "images" / "test" / "a").iterdir()))
    model, preprocess = sslctl.load(workdir / "run")
    torch.testing.assert_close(space["preprocess"](image), preprocess(image), atol=2 / 255, rtol=0)
    assert model(preprocess(image)[None]).shape == (1, 8)
