"""What a method needs of views, queues, backbones, labels and data: refused in a line before anything is written."""

from types import SimpleNamespace

import pytest
from small_benchmark_data import moving_shape, write_folder

from sslctl.cli import main
from sslctl.data.modality import IMAGES
from sslctl.errors import InputError
from sslctl.factory.from_config import refuse_other_views
from tests.methods import DISTILLED, JOINT_EMBEDDING, SIDE, SMALL, SMALLER_VIT, built, words_of
from tests.runs import pretrain
from tests.sequences import COMMON

# --- What does not fit ---


@pytest.mark.parametrize(
    "name", sorted({*JOINT_EMBEDDING, "simclr", "moco"} - {"cpc", "dcl-w", "dinov2-centred", *DISTILLED})
)
def test_too_few_views_are_refused(name):
    source, views = SimpleNamespace(modality=IMAGES), SimpleNamespace(sizes=lambda: {"global": (1, SIDE)})
    with pytest.raises(InputError, match=f"method={name} compares 2 global views"):
        refuse_other_views(built(name).method, source, views, SimpleNamespace(method=name))


def test_too_few_views_are_refused_before_anything_is_written(tmp_path, capsys):
    words = (*words_of("swav"), "augmentation=lejepa", "augmentation.global.count=1")
    assert pretrain(tmp_path / "run", *words) == 2
    assert "method=swav compares 2 global views" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ibot", "dinov2", "msn"])
def test_an_augmentation_without_the_local_views_that_a_method_counts_is_refused(name, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "augmentation=simclr") == 2
    printed = capsys.readouterr().err
    assert printed == (
        "sslctl: augmentation.local: this augmentation has no local views, which are asked for: augmentation=swav, dino"
        " or lejepa\n"
    )


@pytest.mark.parametrize(
    ("name", "words", "printed"),
    [
        ("dinov3", ("augmentation=dino",), "method=dinov3 needs gram views, this augmentation makes none"),
        (
            "dinov3",
            ("method.gram_teacher_from=0.5",),
            "gram_teacher_from=0.5: expected a share",
        ),
        (
            "dinov2",
            ("method.separate_heads=false",),
            "one head has one size, not (16, 8, 20) and, of patches, (16, 8, 12)",
        ),
    ],
)
def test_what_dinov2_and_dinov3_cannot_do_is_refused(name, words, printed, tmp_path, capsys):
    own = [word for word in words_of(name) if not word.startswith("augmentation.")]
    assert pretrain(tmp_path / "run", *own, *words) == 2
    assert printed in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nnclr", "moco", "seed", "compress", "distill"])
def test_an_empty_queue_is_refused(name, tmp_path, capsys):
    size = "method.memory_size=0" if name == "compress" else "method.queue_size=0"
    words = words_of(name) if name in JOINT_EMBEDDING else ("method=moco",)
    assert pretrain(tmp_path / "run", *words, size) == 2
    assert "of 0 embeddings: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ibot", "dinov2", "msn"])
@pytest.mark.parametrize(
    ("words", "actual"), [((), "global_pool=avg"), (("+backbone.kwargs.class_token=false",), "no class token")]
)
def test_a_class_token_is_needed_where_it_is_learnt_by(name, words, actual, tmp_path, capsys):
    assert pretrain(tmp_path / "run", *words_of(name), "+backbone.kwargs.global_pool=avg", *words) == 2
    assert f"learns by the class token, this backbone has {actual}" in capsys.readouterr().err


# --- Processes, precision, accumulation ---


def test_labels_are_asked_for_where_they_are_needed(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(folder / f"{number}.png")
    words = ["pretrain", "method=supcon", "dataset=folder", f"dataset.root={folder}", "trainer.batch_size=2"]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "supcon needs labels" in capsys.readouterr().err


# --- Bad input ---


@pytest.mark.parametrize(
    ("words", "printed"),
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
        (("method=inpainting", "method.hole=round"), "expected centre or blobs"),
        (("method=autoencoder", "method.hidden=1.5"), "hidden=1.5"),
    ],
)
def test_what_a_method_cannot_do_ends_in_a_line_before_anything_is_written(words, printed, tmp_path, capsys):
    vit = SMALLER_VIT if words[0].split("=")[1] in ("mae", "simmim", "ijepa") else ()
    if "backbone=small_resnet" in words:
        vit = ()
    assert pretrain(tmp_path / "run", *SMALL, "scheduler.warmup_epochs=1", *vit, *words) == 2
    err = capsys.readouterr().err
    assert printed in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def bad_frames(folder, kind):
    if kind == "one frame":
        write_folder(folder / "a", moving_shape("disc", 0)[:1])
    elif kind == "no videos":
        folder.mkdir()
    elif kind == "broken video":
        folder.mkdir()
        (folder / "a.mp4").write_bytes(b"no video")
    elif kind == "uneven":
        write_folder(folder / "a", moving_shape("disc", 0))
        write_folder(folder / "b" / "c", moving_shape("disc", 0))
    elif kind == "three frames":
        for number in range(4):
            write_folder(folder / str(number), moving_shape("disc", number))
    elif kind == "empty text":
        folder.mkdir()
        (folder / "a.txt").write_text(" \n")
    elif kind == "short text":
        folder.mkdir()
        (folder / "a.txt").write_text("too short")
    elif kind == "no text":
        folder.mkdir()
        (folder / "a.md").write_text("words")
    elif kind == "no utf-8":
        folder.mkdir()
        (folder / "a.txt").write_bytes(b"\xff\xfe\xfa")
    return folder


@pytest.mark.parametrize(
    ("kind", "method", "more", "printed"),
    [
        ("one frame", "frame_order", (), "has 1 frame, a sample takes 5"),
        ("no videos", "frame_order", (), "no videos in"),
        ("broken video", "frame_order", (), "cannot read"),
        ("uneven", "frame_order", (), "expected <video>/ or <class>/<video>/ throughout"),
        ("three frames", "frame_order", ("dataset.frames=3",), "takes 5 frames, dataset.frames=3"),
        ("three frames", "frame_order", ("dataset.window_frames=4",), "dataset.window_frames=4: a sample takes"),
        ("three frames", "frame_order", ("dataset.channels=2",), "dataset.channels=2: expected 1 or 3"),
        ("short text", "masked_language", ("dataset.length=1",), "dataset.length=1: a sample is [CLS] and"),
        ("nowhere", "frame_order", (), "no such folder"),
        ("empty text", "masked_language", (), "is empty"),
        ("short text", "masked_language", (), "too few for samples of 64"),
        ("no text", "masked_language", (), "no .txt files"),
        ("no utf-8", "masked_language", (), "cannot read"),
        ("short text", "masked_language", ("dataset.vocabulary=10",), "bytes and special tokens at least"),
        ("three frames", "simclr", ("dataset=frames", "dataset.frames=3"), "method=simclr takes images"),
        ("short text", "simclr", ("dataset=text", "dataset.length=2"), "takes images, the dataset has texts"),
        (
            "short text",
            "frame_order",
            ("dataset=text", "dataset.length=2", "backbone=small_transformer"),
            "method=frame_order",
        ),
    ],
)
def test_bad_frames_and_texts_end_in_a_line_before_anything_is_written(kind, method, more, printed, tmp_path, capsys):
    root = bad_frames(tmp_path / "data", kind)
    batch = ("trainer.batch_size=2",)
    words = [
        "pretrain",
        f"method={method}",
        *more,
        f"dataset.root={root}",
        *COMMON,
        *batch,
        f"run_dir={tmp_path / 'run'}",
    ]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert printed in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "data"), [("frame_order", "frames"), ("masked_language", "text")])
def test_a_missing_root_is_asked_for_with_an_example(method, data, tmp_path, capsys):
    assert main(["pretrain", f"method={method}", *COMMON, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "dataset.root is not set: dataset.root=/path/to/" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "kind"), [("av", "broken video"), ("tokenizers", "short text")])
def test_a_missing_package_is_named_with_what_installs_it(package, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    method = "frame_order" if package == "av" else "masked_language"
    root = bad_frames(tmp_path / "data", kind)
    assert main(["pretrain", f"method={method}", f"dataset.root={root}", *COMMON, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "pip install 'sslctl[" in capsys.readouterr().err


def test_images_and_texts_do_not_mix(texts, tmp_path, capsys):
    words = ["pretrain", "method=masked_language", "dataset=digits", "backbone=small_resnet", *COMMON]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "masked_language takes texts" in capsys.readouterr().err
    words = ["pretrain", "method=simclr", "backbone=small_transformer", *COMMON]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "SmallTransformer takes texts, the dataset has images" in capsys.readouterr().err
    assert main(["views", "dataset=text", f"dataset.root={texts}", f"out={tmp_path / 'a.png'}"]) == 2
    assert "nothing to see" in capsys.readouterr().err
