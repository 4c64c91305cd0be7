"""Every experiment says what it is and rests on no default; another method, augmentation or backbone is refused with it."""

import re

import pytest
import yaml
from resolved_values import choices, composed, header_words, values

from sslctl.config.schema import CONFIGS
from sslctl.runs.fingerprint import flat

EXPERIMENTS = choices("experiment")
PINNED = ("method", "dataset", "backbone", "augmentation", "optimizer", "scheduler")
ELSEWHERE = re.compile(  # not what a figure rests on, or on the command line
    r"_target_$|backbone\.(depth|weights|partial|resample_patches|normalization|pretrained|freeze|freeze_epochs|lora\.\w+)$|method\.teacher(_mean|_std|_backbone\..*)?$"
    r"|optimizer\.layer_decay$"
    r"|scheduler\.(shape|warmup_steps|milestones_(epochs|steps))$|trainer\.(precision|accumulate_steps)$"
    r"|dataset\.(channels|resize)$"
)
READ = re.compile(r"\$\{oc\.select:(recipe\.[\w.]+),")


def content(experiment: str) -> dict:
    """What the file holds by itself."""
    return yaml.safe_load((CONFIGS / "experiment" / f"{experiment}.yaml").read_text())


def chosen(experiment: str) -> dict[str, str]:
    """The choices in its defaults: group -> file."""
    return {key.split("/")[1]: value for entry in content(experiment)["defaults"] for key, value in entry.items()}


def from_the_recipe(group: str, name: str) -> dict[str, list[str]]:
    """The keys of a group's file that read a method's or an experiment's recipe: key -> the recipe's keys."""
    text = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    return {f"{group}.{key}": read for key, value in text.items() if (read := READ.findall(str(value)))}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_header_says_what_it_is_and_gives_its_own_command(name):
    header = [line for line in (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines() if line[:2] == "# "]
    assert header[0] == "# @package _global_"
    assert len(header[1]) > 20
    assert [line for line in header if re.match(rf"# sslctl pretrain .*experiment={name}( |$)", line)] == [header[-1]]
    method = composed("pretrain", *header_words(name)).method
    assert "teacher" not in method or method.teacher  # the one thing that no experiment can know


def unstated(own: dict, files: dict[str, str], needed: dict) -> list[str]:
    """The values of a composed experiment that its flat content does not state, itself or as its recipe."""
    recipe = {}
    for group in ("backbone", "optimizer", "scheduler"):
        recipe |= from_the_recipe(group, files[group])
    places = {key: [key] if key in own else recipe.get(key, [key]) for key in needed if not ELSEWHERE.search(key)}
    return [key for key, stated in places.items() if not all(place in own for place in stated)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_value_that_a_figure_rests_on_stands_in_the_file(name):
    own, files = flat(content(name)), chosen(name)
    assert files.keys() == set(PINNED)
    assert unstated(own, files, values(composed("pretrain", *header_words(name)))) == []


@pytest.mark.parametrize(
    ("stated", "value"),
    [
        ("augmentation.global.blur.probability", "augmentation.global.blur.probability"),
        ("dataset.std", "dataset.std"),
        ("method.temperature", "method.temperature"),
        ("recipe.zero_init_residual", "backbone.zero_init_residual"),
        ("recipe.adam.beta2", "optimizer.betas"),
        ("recipe.warmup_epochs", "scheduler.warmup_epochs"),
    ],
)
def test_a_value_left_to_a_default_is_noticed(stated, value):
    name = "swav_cifar10_resnet18"
    own = flat(content(name))
    del own[stated]
    assert unstated(own, chosen(name), values(composed("pretrain", *header_words(name)))) == [value]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_values_arrive(name):
    config = composed("pretrain", *header_words(name))
    own = content(name)
    for group in ("method", "trainer", "dataset", "backbone", "augmentation"):
        for key, value in flat(own.get(group, {})).items():
            if not str(value).startswith("${"):
                node = config[group]
                for part in key.split("."):
                    node = node[part]
                assert node == value, f"{group}.{key}"


@pytest.mark.parametrize(
    ("experiment", "other", "pinned"),
    [
        ("simclr_cifar10_resnet18", "method=moco", "method=simclr"),
        ("swav_imagenet_resnet50", "augmentation=crop", "augmentation=swav"),
        ("dino_imagenet_vit_small", "backbone=mlp", "backbone=timm"),
    ],
)
def test_another_choice_than_its_values_are_for_is_refused(cli, workdir, experiment, other, pinned):
    result = cli("pretrain", f"experiment={experiment}", other, "dataset.root=/nowhere", "plan_only=true")
    assert result.status == 2
    assert result.err == f"sslctl: experiment={experiment} sets values of {pinned}: {other} cannot go with it\n"
    assert not list(workdir.iterdir())


def test_another_network_keeps_an_experiments_recipe():
    """Its stem and initial scale are for networks that have them."""
    backbone = composed("pretrain", "experiment=simclr_cifar10_resnet18", "backbone=small_resnet").backbone
    assert "zero_init_residual" not in backbone
    assert composed("pretrain", "experiment=byol_imagenet_resnet50").backbone.zero_init_residual is False
