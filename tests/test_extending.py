"""What docs/extending.md shows works as it stands there, from outside of the tree."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import sslctl
from sslctl.runs.directory import RESULTS
from sslctl.runs.reading import read_lines

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The files of the page, each where its first line says, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for text in re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL):
        path = tmp_path / re.search(r"^# (my_\S+)$", text, re.MULTILINE)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [shlex.split(command)[1:] for command in re.findall(r"^(sslctl .*)$", PAGE, re.MULTILINE)]


def test_a_users_dataset_backbone_and_protocol_are_trained_on_measured_by_and_loaded(mine, cli):
    pretrain, evaluate = mine
    small = ("trainer.epochs=4", "scheduler.warmup_epochs=1", "trainer.threads=1", "trainer.device=cpu")
    result = cli(*pretrain, *small, "trainer.tensorboard=false")
    assert result.status == 0, result.err
    assert "dropped    flip" in result.out
    accuracy = {
        r["subject"]: r["value"] for r in read_lines(Path("runs/latest") / RESULTS) if r["protocol"] == "linear-cached"
    }
    assert accuracy["trained"] > 0.95  # of two classes that a glance tells apart, and that a flip would exchange
    result = cli(*evaluate, "device=cpu", "cache=false", "subjects=[trained,pixels]")
    assert result.status == 0, result.err
    assert "nearest-mean" in result.out
    means = {
        r["subject"]: r["value"] for r in read_lines(Path("runs/latest") / RESULTS) if r["protocol"] == "nearest-mean"
    }
    assert means["pixels"] == 1.0
    assert means["trained"] > 0.95
    backbone, preprocess = sslctl.load("runs/latest")
    image = preprocess(torch.zeros(1, 16, 16, dtype=torch.uint8))
    assert backbone(image[None]).shape == (1, 32)


def test_a_key_that_the_users_function_does_not_take_is_named(mine, cli):
    result = cli(*mine[0], "plan_only=true", "dataset.cuont=3")
    assert result.status == 2
    assert "dataset.count" in result.err
