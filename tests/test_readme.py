"""What the README shows must work as it stands there."""

import re
import shlex
from pathlib import Path

import pytest

from sslctl.cli import VERBS, main
from sslctl.config.schema import CONFIGS

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every sslctl command of the README, without its comment."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`(sslctl [^`]*)`", README)
    actual = [line for line in [*lines, *inline] if line.startswith("sslctl ") and "VERB" not in line]
    return [shlex.split(line, comments=True)[1:] for line in actual]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_readme_command_composes(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "-sc" in words:
        pytest.skip("installs completion; tested with the command line")
    words = [word for word in words if word not in ("my_configs", "--config-dir", "allow=[my_method]", "method=mine")]
    words = [word.replace("root=…", "root=somewhere") for word in words]
    assert words[0] in VERBS
    assert main([*words, "--cfg", "job"]) == 0, capsys.readouterr().err


def test_readme_method_trains(tmp_path, monkeypatch, capfd):
    method = next(block for block in blocks("python") if "class MyMethod" in block)
    settings = next(block for block in blocks("yaml") if "MyMethod" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_method.py").write_text(method)
    (tmp_path / "my_configs" / "method").mkdir(parents=True)
    (tmp_path / "my_configs" / "method" / "mine.yaml").write_text(settings)
    words = next(words for words in commands() if "method=mine" in words)
    small = ["backbone.widths=[4,8]", "trainer.epochs=1", "trainer.threads=1", "evaluation.closing=false"]
    assert main([*words, *small, "run_dir=run"]) == 0, capfd.readouterr().err
    assert (tmp_path / "run" / "backbone.safetensors").exists()


@pytest.mark.parametrize(
    "group", ["method", "dataset", "scale", "backbone", "optimizer", "scheduler", "augmentation", "experiment"]
)
def test_readme_lists_every_choice(group):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{group}="))
    named = set(re.findall(r"`(\w+)`", row))
    for ending, methods in re.findall(r"`\*(\w+)` for ((?:`\w+` ?)+)", row):  # `*_cifar10_resnet18` for `byol` `dino`
        named |= {f"{method}{ending}" for method in re.findall(r"\w+", methods)}
    assert {file.stem for file in (CONFIGS / group).glob("*.yaml")} <= named
