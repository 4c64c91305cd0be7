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
from tests.test_distributed import distance, steps_of
from tests.training import (
    differences,
    edit,
    finish,
    image_folder,
    in_processes,
    metrics,
    newest,
    pretrain,
    slow,
    tensors,
)

SMALL = (
    "dataset.scale.head_dim=16",
    "dataset.scale.tile_dim=8",
    "dataset.scale.code_dim=8",
    "scheduler.warmup_epochs=1",
)
SMALL += ("dataset.scale.tiled_view=5", "dataset.scale.paired_view=5")
VIT = ("backbone=small_vit", "backbone.kwargs.patch_size=2", "backbone.kwargs.embed_dim=16", "backbone.kwargs.depth=1")
VIT += ("backbone.kwargs.num_heads=2", "dataset.scale.decoder_dim=16", "dataset.scale.decoder_depth=1")
METHODS = {
    "rotation": (),
    "relative_patch": (),
    "jigsaw": ("method.permutations=8",),
    "autoencoder": ("method.noise_std=0.2", "method.hidden=0.25", "method.hidden_size=2"),
    "vae": ("method.beta_warmup_epochs=1",),
    "colorization": ("method.hidden_dim=8", "method.resolution=0.5", "scheduler.warmup_epochs=1"),
    "inpainting": ("method.hole=blobs", "method.adversarial=0.001"),
    "mae": VIT,
    "simmim": (*VIT, "method.mask_size=2"),
    "ijepa": VIT,
}
FAST = ("jigsaw", "mae", "inpainting")
ALL = [name if name in FAST else slow(name) for name in METHODS]


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """120 images, of which about 96 are for training: noise in colour."""
    root = image_folder(tmp_path_factory.mktemp("colours"), 120)
    return (*("dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=16", "trainer.batch_size=16"),)


@pytest.fixture(scope="session")
def words_of(colours):
    def words(name):
        data = colours if name == "colorization" else ()
        return (*data, f"method={name}", *(() if data else SMALL), *METHODS[name])

    return words


@pytest.fixture(scope="module")
def straight(tmp_path_factory, words_of):
    made = {}

    def run(name):
        if name not in made:
            made[name] = finish(tmp_path_factory.mktemp("straight") / "run", *words_of(name))
        return made[name]

    return run


# --- Resume ---


@pytest.mark.parametrize("name", ALL)
def test_resume_at_five_points_equals_the_straight_run(name, straight, words_of, tmp_path):
    run = finish(tmp_path / "run", *words_of(name), stops=(1, 3, 5, 6, 9))
    assert differences(tensors(run), tensors(straight(name))) == []
    assert metrics(run) == metrics(straight(name))


STATE = {
    "rotation": ("classifier.weight",),
    "relative_patch": ("classifier.0.weight",),
    "jigsaw": ("table", "tile_head.0.weight"),
    "autoencoder": ("bottleneck.weight",),
    "vae": ("log_variance_head.bias",),
    "colorization": ("frequency", "counted"),
    "inpainting": ("discriminator.0.weight",),
    "mae": ("mask_token",),
    "simmim": ("mask_token",),
    "ijepa": ("teacher_backbone.network.model.blocks.0.attn.qkv.weight", "mask_token"),
}


def spoilt(tensor):
    """A number is set to 0, the values of a tensor change places."""
    return torch.roll(tensor, 1) if tensor.ndim else tensor * 0


@pytest.mark.parametrize(
    ("name", "part"),
    [(n, p) if (n, p) == ("jigsaw", "table") else slow(n, p) for n, parts in STATE.items() for p in parts],
)
def test_resume_without_a_part_of_the_state_differs(name, part, straight, words_of, tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, *words_of(name), stop_after=6) == 143
    edit(newest(run), weights=lambda stored: stored.update({part: spoilt(stored[part])}))
    finish(run, *words_of(name))
    assert differences(tensors(run), tensors(straight(name))) != []


# --- Processes, precision, accumulation ---


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("name", [slow(name) for name in METHODS])
def test_two_processes_give_the_loss_and_gradients_of_one(name, words_of, tmp_path):
    words = (*words_of(name), "optimizer=sgd", "optimizer.base_lr=0.01")
    (one,) = in_processes(steps_of, tmp_path / "one", words, count=1)
    for its in in_processes(steps_of, tmp_path / "two", words):
        assert distance(its[0]["values"], one[0]["values"]) < 1e-3
        found, expected = ({"all": flat(run[0]["gradients"])} for run in (its, one))
        assert distance(found, expected) < 1e-3


@pytest.mark.parametrize(("name", "precision"), [("mae", "bf16"), slow("inpainting", "fp16")])
def test_losses_in_half_precision_are_finite_and_near_those_of_fp32(name, precision, straight, words_of, tmp_path):
    assert pretrain(tmp_path / "run", *words_of(name), f"trainer.precision={precision}", stop_after=3) == 143
    for found, expected in zip(metrics(tmp_path / "run"), metrics(straight(name)), strict=False):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.1, abs=0.05)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_parts_of_a_batch_add_up_where_images_do_not_meet(name, words_of, tmp_path):
    whole = pretrain(tmp_path / "whole", *words_of(name), "optimizer=sgd", stop_after=1)
    parts = pretrain(tmp_path / "parts", *words_of(name), "optimizer=sgd", "trainer.accumulate_steps=4", stop_after=1)
    assert (whole, parts) == (143, 143)
    left, right = (tensors(tmp_path / name) for name in ("whole", "parts"))
    for key in (key for key in left if key.startswith("method/")):
        torch.testing.assert_close(left[key], right[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "said"), [("ijepa", "one size in the whole batch"), ("inpainting", "one hole is drawn")]
)
def test_accumulation_is_refused_with_the_reason(name, said, words_of, tmp_path, capsys):
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


def test_tensorboard_gets_pictures_and_changes_nothing(straight, words_of, tmp_path):
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
    vit = VIT if words[0].split("=")[1] in ("mae", "simmim", "ijepa") else ()
    if "backbone=small_resnet" in words:
        vit = ()
    assert pretrain(tmp_path / "run", *SMALL, *vit, *words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
