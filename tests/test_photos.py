"""The photographs' patches: where they are from, that no pixel is in both splits, and the method that needs their colours."""

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_sample_images

from sslctl.config.schema import CONFIGS
from sslctl.data.photos import photos
from tests.conftest import QUICK


@pytest.fixture(scope="module")
def places():
    """The bytes of every patch on a grid of 16 pixels -> where it is: (photograph, row, column), several where some are equal."""
    result = {}
    for number, photograph in enumerate(load_sample_images().images):  # (427, 640, 3)
        for row in range(0, 427 - 31, 16):
            for column in range(0, 640 - 31, 16):
                patch = photograph[row : row + 32, column : column + 32].transpose(2, 0, 1)
                result.setdefault(patch.tobytes(), []).append((number, row, column))
    return result


def covered(source, places) -> np.ndarray:
    """(2, 427, 640) bool: the pixels of the photographs that are in a split's patches."""
    pixels = np.zeros((2, 427, 640), dtype=bool)
    for image in source.images:
        for number, row, column in places[image.numpy().tobytes()]:
            pixels[number, row : row + 32, column : column + 32] = True
    return pixels


def test_no_pixel_of_a_photograph_is_in_both_splits(places):
    train, test = (covered(photos(split, 32), places) for split in ("train", "test"))
    assert not (train & test).any()
    assert (train.mean(), test.mean()) == pytest.approx((0.8 * 416 / 427, 0.2 * 416 / 427))  # the last rows are in none


def test_a_patch_is_of_the_photograph_and_the_third_that_its_class_names(places):
    for split, count in (("train", 1450), ("test", 300)):
        source = photos(split, 32)
        assert source.images.shape == (count, 3, 32, 32)
        assert source.classes[::3] == ("china, top", "flower, top")
        assert torch.bincount(source.labels, minlength=6).min() > 0.15 * count
        for image, label in zip(source.images, source.labels.tolist(), strict=True):
            assert label in [
                3 * number + int(3 * (row + 16) / 427) for number, row, _ in places[image.numpy().tobytes()]
            ]


def test_they_are_the_same_every_time_and_split_alike_at_every_size():
    first, again, smaller = (photos("test", size) for size in (32, 32, 16))
    assert torch.equal(first.images, again.images)
    assert first.content_hash == again.content_hash != smaller.content_hash
    assert torch.equal(first.labels, smaller.labels)
    assert smaller.images.shape == (300, 3, 16, 16)
    pooled = torch.nn.functional.avg_pool2d(first.images.float(), 2)
    assert (pooled - smaller.images).abs().mean() < 4  # the same places, smaller


def test_the_normalisation_is_that_of_the_training_patches():
    config = yaml.safe_load((CONFIGS / "dataset" / "photos.yaml").read_text())
    pixels = photos("train", 32).images.float() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(config["mean"], abs=1e-3)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(config["std"], abs=1e-3)


def test_colours_are_learnt_by_the_method_alone(cli, workdir):
    quick = [word for word in QUICK if not word.startswith(("method=", "backbone"))]
    small = ("backbone.widths=[4,8]", "dataset.scale.colour_dim=8", "method.resolution=0.125", "trainer.batch_size=256")
    result = cli("pretrain", "method=colorization", *quick, *small)
    assert result.status == 0, result.err
    assert "1,450 images of 3×32×32" in result.out
    (run,) = (workdir / "runs" / "photos").iterdir()
    assert (run / "backbone.safetensors").exists()


def test_grey_images_are_refused_with_advice_that_works(cli, workdir):
    result = cli("pretrain", "method=colorization", "dataset=digits", "plan_only=true")
    assert result.status == 2
    assert result.err == (
        "sslctl: method: colorization needs colour images, these are grey: dataset=photos, cifar10 or folder\n"
    )
