"""sslctl.load: a finished run's backbone in Python, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

import sslctl
from sslctl.data.modality import TEXTS
from sslctl.errors import InputError
from sslctl.evaluation.subjects import trained
from sslctl.factory.backbone_file import save_backbone
from sslctl.factory.exportable import feature_names, find_backbone, with_pooling
from sslctl.factory.teacher import load_teacher
from sslctl.models.preprocess import Preprocess, TextPreprocess, Transform
from sslctl.ops.color_space import lab_to_rgb, rgb_to_lab
from sslctl.runs.checkpoint import metadata, newest_valid
from sslctl.views.maker import resize_and_crop
from tests.methods import built
from tests.runs import unsigned, unsigned_metadata
from tests.test_config import choices


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def resized(run):
    """A run whose backbone sees the central 16 pixels of images whose shorter side is 20."""
    path = run / "backbone.safetensors"
    settings = json.loads(metadata(path)["preprocess"]) | {"resize": 20}
    save_file(load_file(path), path, {**unsigned_metadata(path), "preprocess": json.dumps(settings)})
    return run


def test_the_backbone_gives_the_methods_features(finished_run, labelled_images):
    backbone, preprocess = sslctl.load(finished_run)
    images = [Image.open(path) for path in sorted(labelled_images.glob("test/*/*.png"))]
    batch = torch.stack([preprocess(image) for image in images])
    with torch.no_grad():
        ours = backbone(batch)
        theirs = trained(finished_run, newest_valid(finished_run), "backbone").function(batch)
    assert ours.shape == (32, 8)
    assert torch.equal(ours, theirs)
    assert ours.std(0).max() > 0


def test_the_backbone_is_in_eval_mode_and_carries_its_normalisation(finished_run):
    backbone, _ = sslctl.load(str(finished_run))
    assert not any(module.training for module in backbone.modules())
    assert torch.allclose(backbone.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    assert torch.allclose(backbone.normalize(backbone.mean + backbone.std), torch.ones(1, 3, 1, 1))
    one = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(backbone(one)[:1], backbone(one[:1]), atol=1e-6)  # no image depends on the batch


def test_tilde_is_expanded(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    backbone, _ = sslctl.load("~/run")
    assert backbone.embed_dim == 8


# --- The features that are evaluated are those that are kept ---

OF_OTHERS = {  # than the student's own output
    **dict.fromkeys(("dino", "ibot", "dinov2", "dinov3", "ijepa"), "teacher"),
    **dict.fromkeys(("mae", "simmim"), "mean"),
    "colorization": "lightness",
}


def kept_and_evaluated(name, path):
    """What a method's kept backbone makes of its first batch's images, what evaluation sees, and what the student says."""
    its = built(name)
    for parameter in its.method.backbone.parameters():  # away from the teacher
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    method, node = its.method.eval(), OmegaConf.to_container(its.config.backbone, resolve=True)
    channels, side = method.facts.channels, method.facts.image_size
    settings = Preprocess(channels, side, side, [0.5] * channels, [0.3] * channels)
    backbone, pool = find_backbone(method, feature_names(method, settings)[0], settings)
    save_backbone(path, backbone, with_pooling(node, pool), settings)
    images = torch.rand(8, channels, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        evaluated = next(iter(method.features(images).values()))
        return sslctl.load(path)[0](images), evaluated, method.backbone.network(method.backbone.normalize(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(choices("method")) - {"masked_language", "cpc"}))
def test_what_is_kept_of_a_method_gives_the_features_that_are_evaluated(name, tmp_path):
    kept, evaluated, students = kept_and_evaluated(name, tmp_path / "backbone.safetensors")
    assert torch.allclose(kept, evaluated, rtol=1e-5, atol=1e-6)
    if OF_OTHERS.get(name) in ("teacher", "mean"):
        assert not torch.allclose(kept, students, rtol=1e-2, atol=1e-3)


def test_colourisations_backbone_sees_no_colours_wherever_it_is_loaded(tmp_path):
    path = tmp_path / "backbone.safetensors"
    kept_and_evaluated("colorization", path)
    backbone, preprocess = sslctl.load(path)
    colours = preprocess(pixels(16, 16))[None]
    grey = lab_to_rgb(rgb_to_lab(colours) * torch.tensor([1, 0, 0]).view(3, 1, 1))  # as light, without a colour
    with torch.no_grad():
        assert torch.allclose(backbone(colours), backbone(grey), atol=1e-4)
        assert torch.equal(teacher := load_teacher(str(path), None, preprocess.settings)(colours), backbone(colours))
        assert teacher.std() > 0
        backbone.sees_lightness = False
        assert not torch.allclose(backbone(colours), teacher, atol=1e-2)


@pytest.mark.parametrize(("name", "features"), [("simclr", "projector"), ("cpc", "patches")])
def test_features_that_are_no_backbones_own_are_of_none(name, features):
    method = built(name).method.eval()
    settings = Preprocess(1, 16, 16, [0.5], [0.3])
    assert find_backbone(method, features, settings) is None
    assert find_backbone(method, "backbone", settings) == (method.backbone, {})


@pytest.mark.parametrize("name", sorted(choices("method")))
def test_every_network_that_a_method_declares_for_its_features_makes_them(name):
    its = built(name)
    for number, parameter in enumerate(its.method.backbone.parameters()):  # away from the teacher
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    method = its.method.eval()
    facts = method.facts
    settings = Preprocess(
        facts.channels, facts.image_size, facts.image_size, [0.5] * facts.channels, [0.3] * facts.channels
    )
    if method.modality == TEXTS:
        settings = TextPreprocess(method.backbone.network.vocabulary, facts.image_size, "")
    names = feature_names(method, settings)
    assert set(method.feature_networks()) <= set(names)
    kept = {features: actual[0] for features in names if (actual := find_backbone(method, features, settings))}
    assert set(kept) == set(method.feature_networks())
    assert any(backbone is method.backbone for backbone in kept.values()) or name == "ijepa"


def test_a_declaration_that_is_not_true_keeps_nothing(monkeypatch):
    method = built("dino").method.eval()
    next(method.backbone.parameters()).data.add_(0.1)
    settings = Preprocess(1, 16, 16, [0.5], [0.3])
    assert find_backbone(method, "teacher", settings) == (method.teacher_backbone, {})
    monkeypatch.setattr(method, "feature_networks", lambda: {"teacher": (method.backbone, "own")})
    assert find_backbone(method, "teacher", settings) is None


# --- The transform ---


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (30, 50), (50, 30), (9, 12)])
def test_pil_array_and_tensor_give_the_same_input(resized, height, width):
    _, preprocess = sslctl.load(resized)
    array = pixels(height, width)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    result = preprocess(array)
    assert result.shape == (3, 16, 16)
    assert result.dtype == torch.float32
    assert torch.equal(result, preprocess(Image.fromarray(array)))
    assert torch.equal(result, preprocess(tensor))
    assert torch.equal(result, resize_and_crop(tensor, 16, 20).float() / 255)


def test_an_image_of_the_right_size_stays_as_it_is(finished_run):
    _, preprocess = sslctl.load(finished_run)
    array = pixels(16, 16)
    assert torch.equal(preprocess(array), torch.from_numpy(array).permute(2, 0, 1) / 255)


def test_pil_images_of_other_modes_are_converted(finished_run):
    _, preprocess = sslctl.load(finished_run)
    grey = Image.new("L", (16, 16), 51)
    assert torch.allclose(preprocess(grey), torch.full((3, 16, 16), 0.2))
    palette = Image.new("RGB", (16, 16), (255, 0, 51)).quantize(4)
    assert torch.allclose(preprocess(palette)[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_a_backbone_of_grey_images_takes_grey_arrays(run):
    path = run / "preprocess.json"
    path.write_text(json.dumps(unsigned(path) | {"channels": 1}))
    preprocess = Transform(Preprocess(**json.loads(path.read_text())))
    array = pixels(16, 16)[:, :, 0]
    assert preprocess(array).shape == (1, 16, 16)
    assert torch.equal(preprocess(array), preprocess(array[:, :, None]))
    assert torch.equal(preprocess(array), preprocess(Image.fromarray(array)))


@pytest.mark.parametrize(
    "image",
    [
        pixels(16, 16).astype(np.float32),
        pixels(16, 16)[:, :, :1],
        pixels(16, 16)[:, :, 0],
        torch.zeros(16, 16, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(3, 16, 16),
    ],
    ids=["floats", "one-channel", "grey-array", "channels-last", "batch", "float-tensor"],
)
def test_an_input_of_another_kind_is_refused(finished_run, image):
    _, preprocess = sslctl.load(finished_run)
    with pytest.raises(InputError, match=r"expected \(3, H, W\) uint8, found"):
        preprocess(image)


# --- What is refused ---


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, which may then be written anew: load_file maps it into memory."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def test_a_run_that_is_not_finished_is_refused(run):
    (run / "backbone.safetensors").unlink()
    with pytest.raises(InputError, match="is not finished"):
        sslctl.load(run)


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError, match="is not a run directory"):
            sslctl.load(path)


def without_one(tensors):
    tensors.pop(sorted(tensors)[0])


def with_one_more(tensors):
    tensors["network.extra"] = torch.zeros(1)


def with_another_name(tensors):
    name = sorted(tensors)[0]
    tensors[f"{name}s"] = tensors.pop(name)


def with_another_shape(tensors):
    name = next(n for n in sorted(tensors) if tensors[n].ndim == 2)
    tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        (without_one, "1 tensors missing"),
        (with_one_more, "1 tensors unexpected: network.extra"),
        (with_another_name, "1 tensors missing"),
        (with_another_shape, "1 tensors of another shape"),
    ],
)
def test_weights_with_other_tensors_are_refused(run, change, printed):
    path = run / "backbone.safetensors"
    tensors = read(path)
    change(tensors)
    save_file(tensors, path, unsigned_metadata(path))
    with pytest.raises(InputError) as caught:
        sslctl.load(run)
    assert str(path) in str(caught.value)
    assert printed in str(caught.value)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_weights_that_were_cut_are_refused_by_name(run, kept):
    path = run / "backbone.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="is not a safetensors file") as caught:
        sslctl.load(run)
    assert str(path) in str(caught.value)


def test_weights_that_are_a_pickle_are_refused(run):
    path = run / "backbone.safetensors"
    torch.save(read(path), path)
    with pytest.raises(InputError, match="is not a safetensors file"):
        sslctl.load(run)


def test_a_file_that_does_not_describe_itself_is_refused(run):
    path = run / "backbone.safetensors"
    save_file(load_file(path), path)
    with pytest.raises(InputError, match="does not say which backbone it is of"):
        sslctl.load(run)
