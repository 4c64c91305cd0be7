"""The scale of a dataset: what a method takes of it, and how a folder of one's own gets one."""

import json
from types import SimpleNamespace

import pytest
import yaml

from sslctl.config.command_line import prepare
from sslctl.config.schema import CONFIGS
from sslctl.data import layout as layout_of
from sslctl.data import scale, sources
from sslctl.data.folders import FolderKeys
from sslctl.data.scale import choose_scale
from tests.conftest import QUICK, write_images
from tests.test_config import choices, composed, own  # noqa: F401  own is a fixture

FOLDER = ("dataset=folder", "dataset.root=images")


@pytest.fixture
def images(tmp_path, monkeypatch):
    """images/ with 64 images; below 40 a folder is tiny here, below 65 small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scale, "FEWER_THAN", {"tiny": 40, "small": 65})
    return write_images(tmp_path / "images", "a", "b", count=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("dataset"))
@pytest.mark.parametrize("chosen", choices("scale"))
def test_every_dataset_takes_every_scale(name, chosen):
    values = composed(f"dataset={name}", f"scale@dataset.scale={chosen}")["dataset"]["scale"]
    picture = yaml.safe_load((CONFIGS / "dataset" / f"{name}.yaml").read_text()).get("scale", {})
    assert values.items() >= picture.items()
    assert (
        values["queue_size"] == {"tiny": 1024}.get(chosen, 4096) if chosen != "imagenet" else "queue_size" not in values
    )


def test_the_command_line_chooses_another_scale_and_beats_it(cli):
    result = cli("pretrain", "scale=small", "dataset.scale.prototypes=7", "method=swav", "--cfg", "job", "--resolve")
    assert result.status == 0, result.err
    config = yaml.safe_load(result.out)
    assert (config["method"]["hidden_dim"], config["method"]["prototypes"]) == (2048, 7)
    assert config["names"]["scale"] == "small"


@pytest.mark.parametrize(("count", "name"), [(39, "tiny"), (40, "small"), (64, "small"), (65, "imagenet")])
def test_a_folders_scale_is_that_of_its_number_of_images(images, monkeypatch, count, name):
    monkeypatch.setattr(layout_of, "training_layout", lambda *arguments: SimpleNamespace(names=range(count)))
    assert choose_scale(prepare([*FOLDER])) == name


@pytest.mark.parametrize("layout", [(), ("train/", "test/")])
def test_the_images_counted_are_those_trained_on(tmp_path, layout):
    folders = [f"{part}{name}" for part in layout or ("",) for name in ("a", "b")]
    write_images(tmp_path, *folders, count=40)
    keys = FolderKeys(str(tmp_path), image_size=None, channels=3, memory_gb=1)
    assert len(layout_of.training_layout(str(tmp_path), True).names) == len(sources.imagefolder("train", keys))
    assert len(layout_of.training_layout(str(tmp_path), False).names) == len(sources.folder("train", keys))


def test_a_packs_scale_is_that_of_the_images_that_it_says_it_has(tmp_path, monkeypatch):
    """A pack's own file says it, or Hugging Face's; where neither does, none is chosen. No image is looked at."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pack" / "train"
    folder.mkdir(parents=True)
    (tmp_path / "pack" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    words = prepare(["dataset=hf", "dataset.root=pack"])
    assert choose_scale(words) is None
    for count, name in ((4_999, "tiny"), (5_000, "small"), (200_000, "imagenet")):
        (folder / "dataset_info.json").write_text(json.dumps({"splits": {"train": {"num_examples": count}}}))
        assert choose_scale(words) == name
    pack = {"splits": {"train": {"images": 7, "files": {}}}}
    (tmp_path / "pack" / "sslctl-pack.json").write_text(json.dumps(pack))
    assert choose_scale(words) == "tiny"
    assert choose_scale(prepare(["dataset=hf", "dataset.root=pack", "dataset.splits={train: other}"])) is None


@pytest.mark.parametrize(
    "words",
    [
        (*FOLDER, "scale=small"),
        (*FOLDER, "experiment=simclr_cifar10_resnet18"),  # has a recipe of its own
        ("dataset=digits", "dataset.root=images"),
        ("eval_dataset=folder", "dataset.root=images"),
        ("dataset=folder",),
        ("dataset=folder", "dataset.root=nowhere"),  # is refused by whoever reads it
    ],
)
def test_no_scale_is_chosen_for_other_command_lines(images, words):
    assert choose_scale(prepare([*words])) is None


def test_a_sweep_over_folders_of_one_scale_has_it(images, tmp_path):
    write_images(tmp_path / "more images", count=45)
    assert choose_scale(prepare(["-m", "dataset=folder", "dataset.root=images,more images"])) == "small"


@pytest.mark.parametrize("words", [("dataset=folder", "dataset.root=images,few"), ("dataset=folder,digits", FOLDER[1])])
def test_a_sweep_over_several_scales_is_refused(cli, images, tmp_path, words):
    write_images(tmp_path / "few", count=3)
    result = cli("pretrain", "-m", *words)
    assert result.status == 2
    assert "folder images: small" in result.err
    assert "scale=…" in result.err
    assert choose_scale(prepare(["-m", *words, "scale=tiny"])) is None


def test_a_run_on_a_folder_says_its_scale_records_it_and_resumes_with_it(cli, images, tmp_path):
    words = ("pretrain", *QUICK, "method=moco", "method.batchnorm_groups=1", *FOLDER)
    first = cli(*words)
    assert first.status == 0, first.err
    assert "scale      small: 64 samples; scale=… chooses another\n" in first.out
    (path,) = (tmp_path / "runs" / "folder").glob("*/config.yaml")
    config = yaml.safe_load(path.read_text())
    assert (config["names"]["scale"], config["method"]["queue_size"]) == ("small", 4096)
    again = cli(*words)
    assert again.status == 0, again.err
    assert f"already finished: runs/folder/{path.parent.name}\n" in again.out

    write_images(images, "c", count=32)  # the folder grows over the bound
    refused = cli(*words, f"run_dir={path.parent}")
    assert refused.status == 2
    assert "content of data:" in refused.err
    assert "method.queue_size: 4096 → 65536\n" in refused.err


OWN = """_target_: sslctl.data.sources.digits
image_size: 16
drops: []
mean: [0.3]
std: [0.3]
"""


def test_a_users_dataset_without_a_scale_has_the_methods_published_values(cli, own):  # noqa: F811
    folder = own("dataset/mine.yaml", OWN)
    words = ("pretrain", "dataset=mine", f"--config-dir={folder}")
    result = cli(*words, "--cfg", "job", "--resolve")
    assert result.status == 0, result.err
    config = yaml.safe_load(result.out)
    assert (config["method"]["queue_size"], config["names"]["scale"]) == (65536, None)
    refused = cli(*words, "scale=tiny")
    assert refused.status == 2
    assert "this dataset has no scale" in refused.err

    own("dataset/mine.yaml", "defaults:\n  - /scale@scale: small\n  - _self_\n" + OWN)
    result = cli(*words, "scale=tiny", "--cfg", "job", "--resolve")
    assert yaml.safe_load(result.out)["method"]["queue_size"] == 1024
