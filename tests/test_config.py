"""The configurations: their order, what beats what, that every file composes and trains, and a user's own method."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import sslctl
from sslctl.config import targets as binding
from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.config.schema import CONFIGS, SCHEMAS, PretrainConfig
from sslctl.config.validation import mistakes
from sslctl.evaluation.subjects import trained
from sslctl.factory.backbone_file import OtherFeatures
from sslctl.factory.from_run import load_method
from sslctl.runs.checkpoint import load_tensors, newest_valid
from tests.conftest import QUICK


def choices(group: str) -> list[str]:
    """The files of a group."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def own_values(group: str, name: str) -> dict:
    """What a file of a group holds by itself, uncomposed."""
    return yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())


def resolved(config) -> dict:
    """Plain values; `names` asks the running job for its choices, and there is none."""
    return {
        key: OmegaConf.to_container(config[key], resolve=True) if OmegaConf.is_config(config[key]) else config[key]
        for key in config
        if key != "names"
    }


def composed(*words: str, config_dir: Path | None = None) -> dict:
    """The resolved configuration of a pretraining."""
    return resolved(compose_choices("pretrain", Prepared(config_dirs=[config_dir] if config_dir else []), list(words)))


# --- What beats what ---


def test_the_defaults_order_is_fixed():
    defaults = yaml.safe_load((CONFIGS / "pretrain.yaml").read_text())["defaults"]
    order = [entry if isinstance(entry, str) else next(iter(entry)) for entry in defaults]
    assert order == [
        *("pretrain_schema", "_probe", "_self_", "dataset", "dataset@eval_dataset", "augmentation", "backbone"),
        *("optimizer", "scheduler", "trainer", "method", "experiment", "hydra"),
    ]


def test_another_optimizer_takes_nothing_from_the_first():
    sgd = composed("method=moco")["optimizer"]
    adamw = composed("method=moco", "optimizer=adamw")["optimizer"]
    recipe = own_values("method", "moco")["recipe"]
    assert (sgd["base_lr"], sgd["weight_decay"]) == (recipe["sgd"]["base_lr"], recipe["sgd"]["weight_decay"])
    assert (adamw["base_lr"], adamw["weight_decay"]) == (recipe["adamw"]["base_lr"], recipe["adamw"]["weight_decay"])
    assert adamw["base_lr"] != sgd["base_lr"]
    assert "momentum" in sgd
    assert "momentum" not in adamw


def test_an_optimizer_without_a_recipe_has_its_own_values():
    optimizer = composed("method=moco", "optimizer=rmsprop")["optimizer"]
    assert (optimizer["base_lr"], optimizer["weight_decay"], optimizer["momentum"]) == (1e-3, 0.0, 0.9)


@pytest.mark.parametrize("order", [1, -1])
def test_the_command_line_beats_the_recipe_in_any_order(order):
    words = ["optimizer.base_lr=0.5", "optimizer.momentum=0.1", "method=moco", "optimizer=sgd"][::order]
    optimizer = composed(*words)["optimizer"]
    assert (optimizer["base_lr"], optimizer["momentum"]) == (0.5, 0.1)
    assert optimizer["weight_decay"] == composed("method=moco")["optimizer"]["weight_decay"]


def test_the_command_line_reaches_a_recipe():
    assert composed("method=moco", "recipe.sgd.base_lr=0.7")["optimizer"]["base_lr"] == 0.7


def test_a_method_takes_the_datasets_scale_and_the_command_line_beats_it():
    assert composed("method=moco", "dataset=digits")["method"]["queue_size"] == 1024
    assert composed("method=moco", "dataset=folder")["method"]["queue_size"] == 65536
    assert composed("method=moco", "dataset=digits", "method.queue_size=64")["method"]["queue_size"] == 64


@pytest.fixture
def own(tmp_path):
    """A function that writes files of a user's configuration directory, and the directory."""
    folder = tmp_path / "own"

    def write(name: str, text: str) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return folder

    return write


PINNED = """# @package _global_
defaults:
  - override /method: simclr
method:
  temperature: 0.25
recipe:
  lars:
    base_lr: 0.9
trainer:
  epochs: 7
"""


def test_an_experiment_beats_method_dataset_and_recipe(own):
    folder = own("experiment/pinned.yaml", PINNED)
    plain = composed("method=simclr")
    config = composed("experiment=pinned", config_dir=folder)
    assert config["method"] == plain["method"] | {"temperature": 0.25}
    assert (config["optimizer"]["base_lr"], config["trainer"]["epochs"]) == (0.9, 7)
    assert (plain["optimizer"]["base_lr"], plain["trainer"]["epochs"]) != (0.9, 7)


def test_the_command_line_beats_an_experiment(own):
    folder = own("experiment/pinned.yaml", PINNED)
    words = ("experiment=pinned", "method.temperature=0.1", "trainer.epochs=2", "optimizer.base_lr=0.3")
    config = composed(*words, config_dir=folder)
    assert (config["method"]["temperature"], config["trainer"]["epochs"]) == (0.1, 2)
    assert config["optimizer"]["base_lr"] == 0.3


@pytest.mark.parametrize(("method", "status"), [("simclr", 0), ("moco", 2)])
def test_an_experiment_that_pins_its_method_refuses_another(cli, own, method, status):
    folder = own("experiment/pinned.yaml", PINNED)
    words = ("pretrain", "--config-dir", str(folder), "experiment=pinned", *QUICK, "plan_only=true")
    result = cli(*words, f"method={method}")
    assert result.status == status, result.err
    if status:
        assert result.err == ("sslctl: experiment=pinned sets values of method=simclr: method=moco cannot go with it\n")


# --- Every file ---


@pytest.mark.parametrize("optimizer", choices("optimizer"))
def test_an_optimizer_has_its_own_keys_whatever_the_method_recommends(optimizer):
    config = composed("method=barlow_twins", f"optimizer={optimizer}")["optimizer"]
    assert config.keys() == own_values("optimizer", optimizer).keys()
    recommended = own_values("method", "barlow_twins")["recipe"].get(optimizer, {})
    assert {key: config[key] for key in recommended} == recommended
    assert isinstance(config["base_lr"], float)


@pytest.mark.parametrize("method", choices("method"))
def test_every_value_of_a_recipe_is_read_by_a_file(method):
    """By its optimizer's, or a scheduler's or backbone's: a misspelt key would change nothing."""
    groups = ("optimizer", "scheduler", "backbone")
    texts = {name: (CONFIGS / group / f"{name}.yaml").read_text() for group in groups for name in choices(group)}
    for key, value in own_values("method", method).get("recipe", {}).items():
        if isinstance(value, dict):
            assert [own for own in value if f"${{oc.select:recipe.{key}.{own}," not in texts[key]] == []
        else:
            assert any(f"${{oc.select:recipe.{key}," in text for text in texts.values()), key


SMALL = "backbone=small_resnet backbone.widths=[4,8]"
EXTRA = {  # what a choice needs to be small
    "backbone=timm": ("backbone.model=vit_tiny_patch16_224", "+backbone.kwargs.depth=1"),
    "backbone=small_resnet": ("backbone.widths=[4,8]",),
    "method=cpc": ("backbone=small_resnet", "backbone.widths=[4,8]", "method.grid=3", "method.reach=2"),
    "method=deepcluster_v2": ("backbone=small_resnet", "backbone.widths=[4,8]", "method.prototypes=8"),
    **{
        f"method={name}": ("backbone=small_vit", "backbone.kwargs.patch_size=4")
        for name in ("ibot", "dinov2", "dinov3", "msn")
    },
    **{f"method={name}": ("method.teacher={teacher}",) for name in ("seed", "compress", "distill")},
    "method=wmse": ("method.whitening_size=16", "method.out_dim=8"),
    **{f"method={name}": ("backbone=small_resnet", "backbone.widths=[4,8]") for name in ("dino", "lejepa", "swav")},
}
TILES = ("backbone=small_resnet", "backbone.widths=[4,8]", "augmentation.global.size=2.5")
PATCHES = (
    "backbone=small_vit",
    "backbone.kwargs.patch_size=4",
    "backbone.kwargs.depth=1",
)
EXTRA |= {
    "method=colorization": ("backbone=small_resnet", "backbone.widths=[4,8]"),
    "method=relative_patch": TILES,
    "method=jigsaw": (*TILES, "method.permutations=8"),
    **{f"method={name}": PATCHES for name in ("mae", "simmim", "ijepa")},
    "method=inpainting": ("method.code_dim=16",),
}
EXTRA["method=simmim"] += ("method.mask_size=4",)
EXTRA["method=ijepa"] += ("method.targets=2",)
OF_SEQUENCES = ("method=frame_order", "method=masked_language", "backbone=small_transformer")  # tested with their data
FAST = ("method=moco", "method=dino", "method=mae", "optimizer=lars", "scheduler=cosine", "backbone=small_vit")
EVERY = [
    *(f"{group}={name}" for group in ("method", "optimizer", "scheduler", "trainer") for name in choices(group)),
    *(
        f"augmentation={name} method=supervised {SMALL}" for name in choices("augmentation")
    ),  # takes any number of views
    *(f"backbone={name}" for name in choices("backbone")),
]
EVERY = [choice for choice in EVERY if choice not in OF_SEQUENCES]


NARROW = {  # what methods take from a dataset's scale, which a folder of images leaves at ImageNet's
    **{"head_dim": 32, "prototypes": 32, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    **{"code_dim": 16, "tile_dim": 16, "queue_size": 64, "local_views": 2, "dino_views": 2},
}


def narrow(choice: str) -> list[str]:
    """Overrides that make the wide and deep parts of a method small, for the sake of time."""
    group, _, name = choice.partition("=")
    read = rf"^  (\w+): \${{oc\.select:dataset\.scale\.({'|'.join(NARROW)}),"
    values = re.findall(read, (CONFIGS / group / f"{name}.yaml").read_text(), re.MULTILINE) if group == "method" else ()
    return [f"method.{key}={NARROW[scale]}" for key, scale in values]


def trained_tensors(state: dict) -> list[tuple[str, torch.Tensor]]:
    """The trained tensors of a backbone: neither its normalisation nor BatchNorm's statistics."""
    statistics = ("mean", "std", "running_mean", "running_var", "num_batches_tracked")
    return [(name, tensor) for name, tensor in state.items() if name.rpartition(".")[2] not in statistics]


@pytest.mark.parametrize("choice", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in EVERY])
def test_every_choice_takes_two_steps(cli, workdir, labelled_images, finished_run, choice):
    words = choice.split()
    extra = [*narrow(choice), *(word.format(teacher=finished_run) for word in EXTRA.get(choice, ()))]
    quick = [word for word in QUICK if not (word.startswith("backbone") and "backbone" in f"{choice} {extra}")]
    data = ("dataset=imagefolder", f"dataset.root={labelled_images}", "trainer.log_every_steps=1", "run_dir=run")
    result = cli("pretrain", *quick, *data, *words, *extra)
    assert result.status == 0, result.err
    losses = [json.loads(line)["loss"] for line in (workdir / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    after = load_tensors(workdir / "run" / "backbone.safetensors")
    before = load_method(workdir / "run").backbone.state_dict()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], tensor) for name, tensor in trained_tensors(before))
    if choice == "method=cpc":  # the mean over patches, which are fed one by one
        with pytest.warns(OtherFeatures, match="features=patches"):
            sslctl.load(workdir / "run")
        return
    kept = sslctl.load(workdir / "run")[0]
    evaluated = trained(workdir / "run", newest_valid(workdir / "run"), None)
    images = torch.rand(8, *evaluated.preprocess.example(torch.device("cpu")).shape[1:])
    with torch.no_grad():
        assert torch.allclose(kept(images), evaluated.function(images), rtol=1e-5, atol=1e-6)


def test_check_looks_at_every_file(cli, monkeypatch):
    """That nothing is wrong in sslctl's own: their runs above, tests/test_resolved_values.py, and of verbs the next test."""
    monkeypatch.setattr("sslctl.commands.check.problems_of", lambda *_: [])
    result = cli("check")
    assert (result.status, result.err) == (0, "")
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"hydra", "protocols", "adaptation"}
    listed = [f"ok      {verb}" for verb in SCHEMAS]
    listed += [f"ok      adapt recipes=[{name}]" for name in choices("adaptation")]
    listed += [f"ok      pretrain {group}={name}" for group in groups for name in choices(group)]
    listed += [f"ok      evaluate protocols=[{name}]" for name in choices("protocols")]
    assert sorted(result.out.splitlines()[:-1]) == sorted(listed)
    assert result.out.endswith(f"\n{len(listed)} configurations compose, and every signature binds\n")


@pytest.mark.slow
def test_check_names_a_users_wrong_file(cli, own, monkeypatch):
    monkeypatch.setattr("sslctl.commands.check.GROUPS", {"pretrain": ("optimizer", "trainer")})
    own("optimizer/bent.yaml", (CONFIGS / "optimizer" / "sgd.yaml").read_text() + "momentun: 0.9\n")
    folder = own("trainer/endless.yaml", "defaults:\n- default\n- _self_\nepochs: many\n")
    result = cli("check", "--config-dir", str(folder))
    assert result.status == 2
    wrong = [line for line in result.out.splitlines() if line.startswith("wrong")]
    assert wrong == ["wrong   pretrain optimizer=bent", "wrong   pretrain trainer=endless"]
    bent, endless = result.err.splitlines()
    assert "optimizer=bent: optimizer.momentun is not an argument of SGD (nearest: momentum)" in bent
    assert "trainer=endless: " in endless
    assert "many" in endless


# --- Free dictionaries ---


def test_a_free_dictionary_takes_new_keys(cli):
    words = (
        "backbone=timm",
        "+backbone.kwargs.depth=1",
        "+backbone.kwargs.embed_dim=24",
        "+backbone.kwargs.num_heads=2",
    )
    result = cli("pretrain", *words, "--cfg", "job")
    assert result.status == 0, result.err
    assert yaml.safe_load(result.out)["backbone"]["kwargs"] == {"depth": 1, "embed_dim": 24, "num_heads": 2}


def test_a_teachers_network_is_free_as_well(cli):
    words = ("method=seed", "backbone@method.teacher_backbone=timm", "+method.teacher_backbone.kwargs.img_size=32")
    result = cli("pretrain", *words, "--cfg", "job")
    assert result.status == 0, result.err
    assert yaml.safe_load(result.out)["method"]["teacher_backbone"]["kwargs"] == {"img_size": 32}


def test_keys_of_a_free_dictionary_reach_the_model(cli):
    quick = [word for word in QUICK if not word.startswith("backbone")]
    words = (
        "backbone=timm",
        "+backbone.kwargs.depth=1",
        "+backbone.kwargs.embed_dim=24",
        "+backbone.kwargs.num_heads=2",
    )
    result = cli("pretrain", *quick, *words, "plan_only=true")
    assert result.status == 0, result.err
    assert "24 features" in result.out


# --- A user's method: one file and one YAML ---

MODULE = """import os
from pathlib import Path

import torch.nn.functional as F
from sslctl.models.heads import mlp
from sslctl.methods.base import Batch, Facts, Method

Path(os.environ["CANARY"]).touch()


class MyMethod(Method):
    def __init__(self, backbone, facts: Facts, *, out_dim: int, temperature: float):
        super().__init__(backbone, facts)
        self.projector = mlp(backbone.embed_dim, 8, out_dim, 2, norm=True, last_norm=False)
        self.temperature = temperature

    def training_step(self, batch: Batch, s: dict) -> dict:
        z1, z2 = (self.projector(self.backbone(view)) for view in batch.views["global"])
        return {"loss": F.mse_loss(z1, z2) / self.temperature}
"""
YAML = """# @package _global_
defaults:
  - override /augmentation: moco_v2
  - override /optimizer: sgd
method:
  _target_: my_method.MyMethod
  out_dim: 4
  temperature: 0.5
"""


@pytest.fixture
def canary(tmp_path_factory, monkeypatch):
    """A file that importing the user's module makes."""
    path = tmp_path_factory.mktemp("canary") / "imported"
    monkeypatch.setenv("CANARY", str(path))
    return path


@pytest.fixture
def my_method(own, canary, workdir, labelled_images):
    """The words of a short training with a user's method, and its configuration directory."""
    own("my_method.py", MODULE)
    folder = own("method/my_method.yaml", YAML)
    quick = [word for word in QUICK if not word.startswith("method=")]
    data = ("dataset=imagefolder", f"dataset.root={labelled_images}")
    return ("pretrain", *quick, *data, "run_dir=run", "method=my_method"), folder


@pytest.mark.parametrize("option", ["--config-dir {}", "--config-dir={}", "-cd {}"])
def test_a_users_method_trains_and_finishes(cli, workdir, my_method, canary, option):
    words, folder = my_method
    result = cli(*words, *option.format(folder).split(), "allow=[my_method]")
    assert result.status == 0, result.err
    assert canary.exists()
    backbone, _ = sslctl.load("run")
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 8)


def test_a_users_package_may_be_allowed_by_the_environment(cli, my_method, monkeypatch):
    words, folder = my_method
    monkeypatch.setenv("SSLCTL_ALLOW", "my_method")
    assert cli(*words, "--config-dir", str(folder), "plan_only=true").status == 0


@pytest.mark.parametrize("allow", [(), ("allow=[another]",), ("allow=[my_metho]",)])
def test_a_users_method_is_refused_and_not_run_unless_allowed(cli, workdir, my_method, canary, allow):
    words, folder = my_method
    result = cli(*words, "--config-dir", str(folder), *allow)
    assert result.status == 2
    assert "my_method.MyMethod" in result.err
    assert "allow=[my_method]" in result.err
    assert not canary.exists()
    assert not (workdir / "run").exists()


def test_a_configuration_file_cannot_allow_itself(cli, own, my_method, canary):
    words, folder = my_method
    own("method/my_method.yaml", YAML + "allow: [my_method]\n")
    result = cli(*words, "--config-dir", str(folder))
    assert result.status == 2
    assert not canary.exists()


def test_a_finished_run_of_a_users_method_allows_nothing_by_itself(cli, my_method, canary, monkeypatch):
    words, folder = my_method
    with monkeypatch.context() as patch:
        patch.setattr(binding, "_allowed", list(binding._allowed))
        assert cli(*words, "--config-dir", str(folder), "allow=[my_method]").status == 0
    canary.unlink()
    del sys.modules["my_method"]  # as in another process
    result = cli("knn-eval", "run", "plan_only=true", "--config-dir", folder)
    assert result.status == 2
    assert "allow=[my_method]" in result.err
    assert not canary.exists()


@pytest.mark.parametrize(
    ("before", "after", "printed"),
    [
        ("out_dim: 4", "out_dimm: 4", "method.out_dimm is not an argument of MyMethod (nearest: out_dim)"),
        ("out_dim: 4", "out_dim: four", "method.out_dim=four: MyMethod expects a whole number"),
        ("  out_dim: 4\n", "", "method.out_dim is missing: MyMethod needs it"),
        ("MyMethod", "MyMetod", "method._target_=my_method.MyMetod cannot be imported"),
    ],
)
def test_a_mistake_in_a_users_file_is_named(cli, workdir, own, my_method, before, after, printed):
    words, folder = my_method
    assert before in YAML
    own("method/my_method.yaml", YAML.replace(before, after))
    result = cli(*words, "--config-dir", str(folder), "allow=[my_method]")
    assert result.status == 2
    assert printed in result.err
    assert "Traceback" not in result.err
    assert not (workdir / "run").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("augmentation.global=${oc.dict.keys:trainer}", "augmentation.global: expected a dictionary, found a list"),
        ("augmentation.global=${seed}", "augmentation.global: expected a dictionary, found a whole number"),
        ("augmentation.global.jitter=${run_dir}", "augmentation.global.jitter: expected a dictionary, found null"),
        ("augmentation.global=${trainer}", "of another node: count is missing"),
        ("augmentation.global.scale=${seed}", "augmentation.global.scale: expected a list of numbers, found a whole"),
        ("probe=${trainer}", "of another node: most_steps is missing"),
        ("evaluation.knn=${seed}", "evaluation.knn: expected a dictionary, found a whole number"),
        ("evaluation=${oc.dict.keys:trainer}", "evaluation: expected a dictionary, found a list"),
        ("recipe=${seed}", "recipe: expected a dictionary, found a whole number"),
        ("backbone.widths=${oc.dict.keys:trainer}", "backbone.widths=epochs: expected a number"),
    ],
)
def test_a_node_that_refers_to_one_of_another_shape_is_refused(word, message):
    config = compose_choices("pretrain", Prepared(), ["dataset=digits", word])
    problems = mistakes(PretrainConfig, config)
    assert message in problems[0]
    assert len(problems) <= 3
    assert max(map(len, problems)) < 300


def test_nodes_that_refer_to_others_of_their_shape_are_taken():
    words = ("dataset=digits", "augmentation=swav", "augmentation.local.jitter=${augmentation.global.jitter}")
    assert mistakes(PretrainConfig, compose_choices("pretrain", Prepared(), [*words, "probe.lr=${probe.lr}x"])) != []
    assert mistakes(PretrainConfig, compose_choices("pretrain", Prepared(), list(words))) == []
