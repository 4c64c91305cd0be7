"""Every experiment is a recipe that says what it is, and holds nothing but what makes it differ."""

import re

import pytest
import yaml
from omegaconf import OmegaConf

from sslctl.cli import main
from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.config.schema import CONFIGS
from sslctl.runs.fingerprint import flat

FILES = {path.stem: path for path in sorted((CONFIGS / "experiment").glob("*.yaml"))}


def composed(words):
    config = compose_choices("pretrain", Prepared(config_dirs=[]), words)
    OmegaConf.set_struct(config, False)
    config.pop("names")  # of a job that runs
    return flat(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize("name", FILES)
def test_the_header_says_what_it_is_and_gives_its_own_command(name):
    header = [line for line in FILES[name].read_text().splitlines() if line.startswith("# ")]
    assert header[0] == "# @package _global_"
    assert len(header[1]) > 20
    assert [line for line in header if re.match(rf"# sslctl pretrain .*experiment={name}( |$)", line)] == [header[-1]]
    words = header[-1].removeprefix("# sslctl pretrain ").split()
    method = compose_choices("pretrain", Prepared(config_dirs=[]), words).method
    assert "teacher" not in method or method.teacher  # the one thing that no experiment can know


@pytest.mark.parametrize("name", FILES)
def test_every_value_differs_from_what_would_be_there_without_it(name):
    content = yaml.safe_load(FILES[name].read_text())
    choices = {key.split("/")[1]: value for entry in content.pop("defaults") for key, value in entry.items()}
    assert "method" in choices
    order = ("dataset", "backbone", "method", "augmentation", "optimizer", "scheduler")
    without = composed([f"{key}={choices[key]}" for key in order if key in choices])
    own = flat(content)
    repeated = {key: value for key, value in own.items() if key in without and without[key] == value}
    assert repeated == {}


PINNED = [name for name, path in FILES.items() if "\nmethod:" in path.read_text()]


@pytest.mark.parametrize("name", PINNED)
def test_another_method_with_a_methods_values_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = "barlow_twins" if "barlow" not in name else "vicreg"
    words = ["pretrain", f"experiment={name}", f"method={other}", "dataset.root=/nowhere", "plan_only=true"]
    assert main(words) == 2
    assert not list(tmp_path.iterdir())
