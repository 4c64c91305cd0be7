"""sslctl export: every format is loaded by its own ecosystem, here by hand, and gives the run's features."""

import dataclasses
import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

import sslctl
from sslctl.cli import main
from sslctl.evaluation.subjects import trained
from sslctl.export.formats import FORMATS
from sslctl.models.backbones import Backbone, ResNet
from sslctl.models.weights import load_weights
from sslctl.runs.checkpoint import newest_valid
from tests.conftest import QUICK, write_images
from tests.runs import unsigned, unsigned_metadata

OTHER = tuple(word for word in QUICK if not word.startswith(("backbone", "method")))
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def pretrained(folder, images, *words):
    run = folder / "run"
    assert main(["pretrain", *OTHER, "dataset=imagefolder", f"dataset.root={images}", f"run_dir={run}", *words]) == 0
    return run


@pytest.fixture(scope="module")
def resnet_run(labelled_images, tmp_path_factory):
    return pretrained(
        tmp_path_factory.mktemp("resnet"),
        labelled_images,
        "method=supervised",
        "backbone=resnet18",
    )


@pytest.fixture(scope="module")
def vit_run(labelled_images, tmp_path_factory):
    """MAE, whose features are the mean of the patches' tokens."""
    tiny = [f"backbone.kwargs.{key}" for key in ("embed_dim=16", "depth=1", "num_heads=2", "patch_size=4")]
    decoder = [f"method.{key}" for key in ("decoder_dim=16", "decoder_depth=1", "decoder_heads=2")]
    return pretrained(tmp_path_factory.mktemp("vit"), labelled_images, "method=mae", *tiny, *decoder)


@pytest.fixture(scope="module")
def teacher_run(labelled_images, tmp_path_factory):
    """DINO, whose features are the teacher's."""
    head = ("method.hidden_dim=8", "method.bottleneck_dim=4", "method.prototypes=8", "optimizer.base_lr=1")
    small = ("backbone=small_resnet", "backbone.widths=[4,8]")
    return pretrained(tmp_path_factory.mktemp("dino"), labelled_images, "method=dino", *small, *head)


@pytest.fixture
def exported(cli):
    """exported(run or words, format, …) -> what was printed."""

    def run(*words, status=0):
        result = cli("export", *words)
        assert result.status == status, result
        return result

    return run


@pytest.fixture(scope="module")
def pictures(labelled_images):
    return [Image.open(path) for path in sorted(labelled_images.glob("test/*/*.png"))]


@pytest.fixture(scope="module")
def batch(pictures):
    """(32, 3, 16, 16) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in pictures]) / 255


@torch.no_grad()
def features(run, batch, which=None):
    """What evaluations take of a run."""
    return trained(run, newest_valid(run), which).function(batch)


def same(actual, wanted):
    assert wanted.std(0).max() > 0
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


# --- Round trips ---


@pytest.mark.slow
def test_torchvision_loads_a_resnet_and_misses_only_its_classifier(exported, resnet_run, tmp_path, batch):
    output = exported(resnet_run, "format=torchvision", f"out={tmp_path}/r.pth").out
    model = torchvision.models.resnet18()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
    outcome = model.load_state_dict(torch.load(tmp_path / "r.pth", weights_only=True), strict=False)
    assert (set(outcome.missing_keys), outcome.unexpected_keys) == ({"fc.weight", "fc.bias"}, [])
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        same(model.eval()((batch - MEAN) / STD), features(resnet_run, batch))
    assert "model.maxpool = torch.nn.Identity()" in output
    text = (tmp_path / "r.pth.md").read_text()
    for words in (
        "- features: 512 for each image, `backbone`",
        f"- weights_sha256: {trained(resnet_run, newest_valid(resnet_run), None).weights_sha256}",
        "- input: RGB images, (B, 3, 16, 16) float32 in [0, 1]",
        "- normalisation: not in the file: apply it first; mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]",
    ):
        assert words in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.pth", "r.pth.md"]
    assert re.search(
        r"loaded by torchvision: largest difference \S+ of features up to .* on 32 images of .*; all 120 tensors equal",
        output,
    )


def test_timm_loads_a_resnet(exported, resnet_run, batch):
    exported(resnet_run, "format=timm")
    model = timm.create_model("resnet18", num_classes=0)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
    timm.models.load_checkpoint(model, str(resnet_run / "export" / "resnet18-timm.safetensors"), strict=True)
    with torch.no_grad():
        same(model.eval()((batch - MEAN) / STD), features(resnet_run, batch))


@pytest.mark.parametrize("images", [3, 4])
def test_few_images_are_enough_to_compare(exported, teacher_run, tmp_path, images):
    printed = exported(teacher_run, f"out={tmp_path}/few.safetensors", f"images={images}").out
    assert re.search(rf"largest difference \S+ of features up to .* on {images} images of ", printed)


@pytest.mark.parametrize(("which", "pool"), [("mean", {"global_pool": "avg", "fc_norm": False}), ("backbone", {})])
def test_timm_loads_a_vision_transformer_with_the_pooling_of_the_features(
    exported, vit_run, tmp_path, batch, which, pool
):
    exported(vit_run, "format=timm", f"features={which}", f"out={tmp_path}/v.safetensors")
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "v.safetensors"), **size, **pool)
    with torch.no_grad():
        same(model.eval()((batch - MEAN) / STD), features(vit_run, batch, which))


@pytest.mark.parametrize("format", ["torchvision", "timm"])
def test_given_weights_come_back_bit_for_bit(exported, labelled_images, tmp_path, format):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, tmp_path / "theirs.pth")
    words = ("backbone=resnet18", "backbone.stem=imagenet", f"backbone.weights={tmp_path}/theirs.pth")
    output = exported(*words, "dataset=imagefolder", f"dataset.root={labelled_images}", f"format={format}").out
    assert "model.conv1" not in output
    (built,) = (tmp_path / "runs" / labelled_images.name / "given" / "export").glob(f"theirs-{format}*[!d]")
    ours = load_file(built) if format == "timm" else torch.load(built, weights_only=True)
    assert ours.keys() == theirs.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("format", ["torchvision", "timm"])
def test_grey_resnets_with_layer_norm_and_imagenets_stem_are_loaded_too(exported, labelled_images, tmp_path, format):
    torch.manual_seed(0)
    torch.save(ResNet(18, "imagenet", False, "layer", 1, 16).state_dict(), tmp_path / "w.pth")
    words = ("backbone=resnet18", "backbone.stem=imagenet", "backbone.norm=layer", f"backbone.weights={tmp_path}/w.pth")
    grey = ("dataset=imagefolder", f"dataset.root={labelled_images}", "dataset.channels=1")
    output = exported(*words, *grey, "dataset.mean=[0.4]", "dataset.std=[0.3]", f"format={format}").out
    assert {"torchvision": "GroupNorm, 1", "timm": "groupnorm1"}[format] in output


def test_a_convolutional_timm_model_keeps_its_name(exported, labelled_images, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=0)
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    words = ("backbone=timm", "backbone.model=mobilenetv3_small_050", f"backbone.weights={tmp_path}/m.pth")
    exported(
        *words, "dataset=imagefolder", f"dataset.root={labelled_images}", "format=timm", f"out={tmp_path}/x.safetensors"
    )
    again = timm.create_model("mobilenetv3_small_050", num_classes=0, checkpoint_path=str(tmp_path / "x.safetensors"))
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in again.state_dict().items())


def test_safetensors_is_loaded_by_safetensors_and_by_sslctl(exported, teacher_run, tmp_path, batch):
    exported(teacher_run, f"out={tmp_path}/t.safetensors")
    backbone, preprocess = sslctl.load(tmp_path / "t.safetensors")
    assert not backbone.training
    assert preprocess.settings.image_size == 16
    with torch.no_grad():
        same(backbone(batch), features(teacher_run, batch, "teacher"))
        assert not torch.allclose(backbone(batch), features(teacher_run, batch, "backbone"), atol=1e-5)
    tensors = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in backbone.state_dict().items())
    fresh, _ = sslctl.load(teacher_run)
    assert "missing" in load_weights(fresh, str(tmp_path / "t.safetensors"), partial=False)  # as backbone.weights=
    assert torch.equal(fresh.network.conv1.weight, backbone.network.conv1.weight)


def test_only_an_export_is_replaced_and_that_is_said(exported, teacher_run, tmp_path):
    for mine in ("t.safetensors", "u.safetensors.md"):
        (tmp_path / mine).write_text("mine")
        refused = exported(teacher_run, f"out={tmp_path / mine.removesuffix('.md')}", status=2).err
        assert "there is a file already, that sslctl export did not write" in refused
        assert (tmp_path / mine).read_text() == "mine"
    exported(teacher_run, f"out={tmp_path}/v.safetensors")
    again = exported(teacher_run, f"out={tmp_path}/v.safetensors").out
    assert f"{tmp_path}/v.safetensors was exported before: it is replaced" in again


def test_the_mean_of_tokens_is_loaded_by_sslctl_too(exported, vit_run, batch):
    exported(vit_run)
    backbone, _ = sslctl.load(vit_run / "export" / "small_vit-mean.safetensors")
    with torch.no_grad():
        same(backbone(batch), features(vit_run, batch, "mean"))


@pytest.mark.slow
def test_onnx_runs_elsewhere_with_any_number_of_images(exported, teacher_run, batch):
    onnxruntime = pytest.importorskip("onnxruntime")
    exported(teacher_run, "format=onnx")
    path = teacher_run / "export" / "small_resnet-teacher.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = features(teacher_run, batch, "teacher")
    for count in (1, 5, 32):
        (actual,) = session.run(["features"], {"images": batch[:count].numpy()})
        same(torch.from_numpy(actual), wanted[:count]) if count > 1 else None
        assert np.abs(actual - wanted[:count].numpy()).max() < 1e-5
    assert [p.name for p in path.parent.iterdir() if "onnx" in p.name and p.suffix == ".data"] == []


def test_torch_export_takes_any_number_of_images(exported, teacher_run, batch):
    exported(teacher_run, "format=torch_export")
    model = torch.export.load(teacher_run / "export" / "small_resnet-teacher.pt2").module()
    wanted = features(teacher_run, batch)
    with torch.no_grad():
        for count in (1, 5, 32):
            torch.testing.assert_close(model(batch[:count]), wanted[:count], rtol=1e-4, atol=1e-5)


def test_features_beyond_a_backbone_are_exported_as_a_graph_without_the_rest(
    exported, teacher_run, finished_run, batch
):
    run = shutil.copytree(finished_run, teacher_run.parent / "simclr", symlinks=True)
    exported(run, "format=torch_export", "features=projector")
    program = torch.export.load(run / "export" / "mlp-projector.pt2")
    with torch.no_grad():
        same(program.module()(batch), features(run, batch, "projector"))


@pytest.mark.slow
def test_colorization_sees_grey_images_inside_the_graph(exported, labelled_images, tmp_path, batch):
    run = pretrained(tmp_path, labelled_images, "method=colorization", "backbone=resnet18")
    exported(run, "format=torch_export")
    program = torch.export.load(run / "export" / "resnet18.pt2")
    assert not [name for name in program.state_dict if "head" in name]
    exported(run, "format=safetensors")
    assert "only their lightness is seen" in (run / "export" / "resnet18.safetensors.md").read_text()
    with torch.no_grad():
        same(program.module()(batch), features(run, batch))
        same(sslctl.load(run / "export" / "resnet18.safetensors")[0](batch), features(run, batch))
    for taker in ("torchvision", "timm"):
        assert "no place for the step from colours to lightness" in exported(run, f"format={taker}", status=2).err


# --- Videos and texts ---


def test_the_network_of_frames_is_one_of_images(exported, tmp_path):
    videos = write_images(tmp_path / "videos", *(f"{number:02}" for number in range(16)), count=5)
    small = ("backbone=small_resnet", "backbone.widths=[4,8]", "method.hidden_dim=8")
    words = ("method=frame_order", "dataset=frames", f"dataset.root={videos}", *small)
    assert main(["pretrain", *OTHER, *words, f"run_dir={tmp_path}/run"]) == 0
    assert "on 16 images of videos" in exported(tmp_path / "run", "format=torch_export").out


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    numbers = np.random.default_rng(0).integers(0, 1000, (40, 60))
    (folder / "words").mkdir()
    for number, row in enumerate(numbers):
        (folder / "words" / f"{number}.txt").write_text(" ".join(map(str, row)))
    tiny = (
        "backbone.embed_dim=8",
        "backbone.depth=1",
        "backbone.heads=2",
        "dataset.vocabulary=300",
        "dataset.length=16",
    )
    words = ("method=masked_language", f"dataset.root={folder}/words", *tiny, f"run_dir={folder}/run")
    assert main(["pretrain", *OTHER, *words]) == 0
    return folder / "run"


def test_the_page_of_a_run_of_texts_shows_what_the_method_makes_of_them(text_run, tmp_path, capsys):
    assert main(["report", str(text_run), "device=cpu", "cache=false", f"out={tmp_path}/page.html"]) == 0
    assert 'alt="texts with hidden words' in (tmp_path / "page.html").read_text()


TEXT = "forty two, and 7"


@pytest.mark.parametrize(
    "format",
    ["safetensors", pytest.param("onnx", marks=pytest.mark.slow)],
)
def test_texts_go_in_as_ids(exported, text_run, format, monkeypatch):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    exported(text_run, f"format={format}")
    (built,) = (text_run / "export").glob(f"*{FORMATS[format].suffix}")
    backbone, transform = sslctl.load(text_run)
    with torch.no_grad():
        wanted = backbone(transform(TEXT)[None])
    if format == "safetensors":
        again, other = sslctl.load(built)
        with torch.no_grad():
            torch.testing.assert_close(again(other(TEXT)[None]), wanted)
        return
    monkeypatch.chdir(built.parent)
    scope = {}
    code = code_of(built)
    before, _, last = code.rstrip().rpartition("\n")
    exec(before, scope)
    ids = torch.tensor([scope["preprocess"](TEXT)])
    scope["tokens"] = ids.numpy()
    exec(last, scope)
    torch.testing.assert_close(torch.as_tensor(scope["features"]).detach(), wanted, rtol=1e-4, atol=1e-5)


def test_torchvision_has_no_networks_for_texts(exported, text_run):
    for format in ("torchvision", "timm"):
        assert "no networks for texts: format=safetensors" in exported(text_run, f"format={format}", status=2).err


# --- The description ---


def code_of(path):
    """The Python of the description beside a file."""
    return re.search(r"```python\n(.*)```", path.with_name(f"{path.name}.md").read_text(), re.DOTALL)[1]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torchvision", "torch_export"])
def test_the_lines_of_the_description_run_as_they_are_from_image_files_to_features(
    exported, resnet_run, teacher_run, tmp_path, monkeypatch, format
):
    run = shutil.copytree(resnet_run if format == "torchvision" else teacher_run, tmp_path / "run", symlinks=True)
    settings = unsigned(run / "preprocess.json") | {"resize": 20}  # so that there is something to cut off
    (run / "preprocess.json").write_text(json.dumps(settings))
    backbone = run / "backbone.safetensors"  # which describes itself
    about = unsigned_metadata(backbone)
    save_file(load_file(backbone), backbone, about | {"preprocess": json.dumps(settings)})
    out = tmp_path / f"file{FORMATS[format].suffix}"
    exported(run, f"format={format}", f"out={out}")
    monkeypatch.chdir(tmp_path)
    before, _, last = code_of(out).rstrip().rpartition("\n")
    scope = {}
    exec(before, scope)
    root = write_images(tmp_path / "odd", size=(23, 30), count=4)
    images = [Image.open(path) for path in sorted(root.glob("*.png"))]
    images = torch.stack([scope["preprocess"](image) for image in images])
    _, transform = sslctl.load(run)
    ours = torch.stack([transform(Image.open(path)) for path in sorted(root.glob("*.png"))])
    assert (images - ours).abs().max() <= 1 / 255 + 1e-6  # processors without AVX2 round otherwise
    scope["images"] = ours
    exec(last, scope)
    torch.testing.assert_close(torch.as_tensor(scope["features"]).detach(), features(run, ours), rtol=1e-4, atol=1e-5)


# --- The check ---


def changed(format, weight_of, by):
    """A format whose file holds another weight than the run."""
    real = FORMATS[format]

    def wrong(network, path):
        weight = weight_of(network.module.network)
        before = weight.data.clone()
        weight.data[0, 0, 0, 0] += by
        real.write(network, path)
        weight.data.copy_(before)

    return dataclasses.replace(real, write=wrong)


@pytest.mark.parametrize(
    ("format", "output"), [("torchvision", "1 of its 120 tensors"), ("safetensors", "1 of its 38 tensors")]
)
def test_a_file_with_another_weight_is_not_kept(
    exported, resnet_run, teacher_run, tmp_path, monkeypatch, format, output
):
    run = resnet_run if format == "torchvision" else teacher_run
    monkeypatch.setitem(FORMATS, format, changed(format, lambda network: network.conv1.weight, 1e-6))
    (tmp_path / "out").mkdir()
    result = exported(run, f"format={format}", f"out={tmp_path}/out/x{FORMATS[format].suffix}", status=1)
    assert f"is not written: loaded by {FORMATS[format].loader}, {output} are not the run's" in result.err
    assert len(result.err.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_graph_with_another_weight_is_not_kept(exported, teacher_run, tmp_path, monkeypatch):
    format = "torch_export"
    monkeypatch.setitem(FORMATS, format, changed(format, lambda network: network.conv1.weight, 0.1))
    (tmp_path / "out").mkdir()
    result = exported(teacher_run, f"format={format}", f"out={tmp_path}/out/x{FORMATS[format].suffix}", status=1)
    assert f"loaded by {FORMATS[format].loader}, its features are not the run's: largest difference" in result.err
    assert len(result.err.splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_features_that_are_no_numbers_do_not_pass(exported, teacher_run, tmp_path, monkeypatch):
    real = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda self, x: real(self, x) * (float("nan") if len(x) == 2 else 1))
    assert "nan" in exported(teacher_run, f"out={tmp_path}/x.safetensors", status=1).err


# --- What is refused ---


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("format=torchvision",), ("takes resnet18, resnet34, resnet50 and resnet101", "SmallResNet", "format=onnx")),
        (("format=timm",), ("SmallResNet", "format=onnx")),
        (("format=onxx",), ("nearest: onnx",)),
        (("out=x.bin",), ("out=x.bin", "writes a .safetensors file", "found .bin")),
        (("features=tutor",), ("features=tutor", "teacher, backbone")),
        (("format=torchvision", "features=teacher"), ("SmallResNet",)),
        (("backbone=resnet18",), ("not both",)),
        (("dataset=digits",), ("takes 3×16×16", "name other images")),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line(exported, teacher_run, words, fragments, workdir):
    result = exported(teacher_run, *words, status=2)
    assert len(result.err.splitlines()) == 1
    assert all(fragment in result.err for fragment in fragments), result.err
    assert list(workdir.iterdir()) == []


def test_a_vision_transformer_is_none_of_torchvisions(exported, vit_run):
    assert "format=timm" in exported(vit_run, "format=torchvision", "features=backbone", status=2).err


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ((), "nothing named"),
        (("backbone=resnet18", "dataset=digits"), "backbone.weights=FILE is missing"),
        (("backbone=resnet18", "backbone.weights=x.pth"), "dataset=…"),
        (("nowhere",), "no such run"),
    ],
)
def test_nothing_to_export_is_said(exported, words, fragment):
    assert fragment in exported(*words, status=2).err


def test_several_runs_do_not_go_into_one_file(exported, teacher_run, vit_run):
    assert "ckpt names 2 runs" in exported(teacher_run, vit_run, "out=x.safetensors", status=2).err


def test_onnx_says_which_packages_are_missing(exported, teacher_run, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else real(name))
    output = exported(teacher_run, "format=onnx", status=2).err
    assert "needs onnx, onnxruntime, onnxscript: pip install 'sslctl[onnx]'" in output
