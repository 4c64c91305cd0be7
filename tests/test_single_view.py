"""What must hold for every method that looks at one view of an image: resume, random numbers, processes, precision, pictures."""

import pytest
import torch
from omegaconf import OmegaConf

from sslctl.cli import main
from sslctl.data.loader import one_batch
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import load_method, views_of
from sslctl.runs import checkpoint
from sslctl.runs.directory import read_config
from tests.built import SINGLE_VIEW, SMALL, SMALLER_VIT, words_of
from tests.test_distributed import distance, steps_of
from tests.training import (
    differences,
    finish,
    in_processes,
    newest,
    pretrain,
    slow,
    tensors,
)

FAST = ("jigsaw", "mae", "inpainting")
ALL = [name if name in FAST else slow(name) for name in SINGLE_VIEW]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    made = {}

    def run(name):
        if name not in made:
            made[name] = finish(tmp_path_factory.mktemp("straight") / "run", *words_of(name))
        return made[name]

    return run


# --- Processes, precision, accumulation ---


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("name", [slow(name) for name in SINGLE_VIEW])
def test_two_processes_give_the_loss_and_gradients_of_one(name, tmp_path):
    words = (*words_of(name), "optimizer=sgd", "optimizer.base_lr=0.01")
    (one,) = in_processes(steps_of, tmp_path / "one", words, count=1)
    for its in in_processes(steps_of, tmp_path / "two", words):
        assert distance(its[0]["values"], one[0]["values"]) < 1e-3
        found, expected = ({"all": flat(run[0]["gradients"])} for run in (its, one))
        assert distance(found, expected) < 1e-3


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_parts_of_a_batch_add_up_where_images_do_not_meet(name, tmp_path):
    whole = pretrain(tmp_path / "whole", *words_of(name), "optimizer=sgd", stop_after=1)
    parts = pretrain(tmp_path / "parts", *words_of(name), "optimizer=sgd", "trainer.accumulate_steps=4", stop_after=1)
    assert (whole, parts) == (143, 143)
    left, right = (tensors(tmp_path / name) for name in ("whole", "parts"))
    for key in (key for key in left if key.startswith("method/")):
        torch.testing.assert_close(left[key], right[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "said"), [("ijepa", "one size in the whole batch"), ("inpainting", "one hole is drawn")]
)
def test_accumulation_is_refused_with_the_reason(name, said, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "trainer.accumulate_steps=2") == 2
    assert said in capsys.readouterr().err


# --- Random numbers and pictures ---


def pictures(run, rows, seed=0):
    """A method's pictures of some images, in eval mode."""
    config = OmegaConf.create(read_config(run))
    method = load_method(run)
    checkpoint.load(newest(run), method)
    source = build_source(config.dataset, "train")
    batch = one_batch(source, views_of(config, source, method), torch.tensor(rows), seed, torch.device("cpu"))
    with torch.no_grad():
        return method.eval().pictures(batch)


@pytest.mark.parametrize("name", ALL)
def test_what_an_image_is_asked_depends_on_seed_epoch_and_image_only(name, straight):
    rows = [7, 3, 20, 41, 5, 11]  # one hole, one size of block for a batch: the first image's
    whole, part = pictures(straight(name), rows), pictures(straight(name), [7, 41, 5])
    assert whole.keys() == part.keys()
    for title, images in whole.items():
        torch.testing.assert_close(images[[0, 3, 4]], part[title], atol=1e-5, rtol=1e-4)
    other = pictures(straight(name), rows, seed=1)
    assert any(not torch.equal(other[title], whole[title]) for title in list(whole)[1:])


@pytest.mark.parametrize("name", ALL)
def test_pictures_are_images_beside_each_other(name, straight):
    shown = pictures(straight(name), [1, 2, 3])
    assert len(shown) >= 2
    for title, images in shown.items():
        assert len(images) == 3, title
        assert images.ndim == 4, title
        assert 0 <= images.min() <= images.max() <= 1, title


@pytest.mark.parametrize("name", ["mae", slow("inpainting"), slow("vae")])
def test_one_command_saves_the_pictures(name, straight, tmp_path, capsys):
    out = tmp_path / "shown.png"
    assert main(["pictures", str(straight(name)), "images=3", f"out={out}"]) == 0
    assert out.stat().st_size > 1000
    assert "3 images at step 10" in capsys.readouterr().out


def test_a_method_without_pictures_says_so(tmp_path, capsys):
    run = finish(tmp_path / "run", "method=simclr", "scheduler.warmup_epochs=0", "trainer.epochs=1")
    assert main(["pictures", str(run)]) == 2
    assert "method=simclr has no pictures to show" in capsys.readouterr().err
    assert main(["pictures"]) == 2
    assert "no run to show" in capsys.readouterr().err


def test_tensorboard_gets_pictures_and_changes_nothing(straight, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = (*words_of("mae"), "trainer.tensorboard=true", "evaluation.knn_every_epochs=1")
    run = finish(tmp_path / "run", *words)
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("pictures")] == [0, 5, 10]
    assert differences(tensors(run), tensors(straight("mae"))) == []


# --- Bad input ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("method=mae", "backbone=small_resnet"), "backbone=small_vit"),
        (("method=mae", "method.mask_ratio=1.0"), "leaves 0 of 16 patches visible"),
        (("method=mae", "backbone.kwargs.patch_size=3"), "patches of 3 pixels do not divide images of 8"),
        (("method=simmim", "method.mask_size=3"), "expected a multiple of the patch"),
        (("method=ijepa", "method.targets=4"), "may cover all 16"),
        (("method=jigsaw", "backbone=mlp"), "takes whole images only"),
        (("method=jigsaw", "dataset.scale.tiled_view=1"), "are too small: enlarge dataset.image_size"),
        (("method=relative_patch", "method.gap=0.1"), "only with gap > 2·jitter"),
        (("method=relative_patch", "dataset.scale.paired_view=1"), "are too small: enlarge dataset.image_size"),
        (("method=colorization",), "needs colour images, these are grey"),
        (("method=inpainting", "method.hole=round"), "expected centre or blobs"),
        (("method=autoencoder", "method.hidden=1.5"), "hidden=1.5"),
    ],
)
def test_bad_input_ends_in_a_line_before_anything_is_written(words, said, tmp_path, capsys):
    vit = SMALLER_VIT if words[0].split("=")[1] in ("mae", "simmim", "ijepa") else ()
    if "backbone=small_resnet" in words:
        vit = ()
    assert pretrain(tmp_path / "run", *SMALL, "scheduler.warmup_epochs=1", *vit, *words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
