"""The clock: the time of a step by its parts."""

import json
from types import SimpleNamespace

import pytest
import torch

import sslctl.ops.timing
from sslctl.ops.timing import PARTS, Clock, format_shares, shares
from tests.runs import MOCO, SIMCLR, finish, image_folder, slow
from tests.test_resume import VIT

MOCO_VIT = ("method=moco", "method.queue_size=600", "method.batchnorm_groups=1", *VIT)


def test_the_parts_add_up_to_the_elapsed_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(sslctl.ops.timing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = Clock(torch.device("cpu"))
    for part, seconds in (("data", 1.0), ("forward", 2.0), ("data", 0.5), ("backward", 4.0)):
        now[0] += seconds
        clock.lap(part)
    now[0] += 8  # not yet anyone's
    assert clock.split() == {"data": 1.5, "forward": 2.0, "backward": 4.0}
    clock.lap("saving")
    assert clock.split() == {"saving": 8.0}
    assert clock.split() == {}


def test_shares_are_of_the_whole():
    seconds = {"forward": 3.0, "data": 1.0}
    assert shares(seconds) == {"time_data": 0.25, "time_forward": 0.75}
    assert format_shares(seconds) == "data 25 %, forward 75 %"
    assert shares({}) == {}
    assert format_shares({}) == ""


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    root = image_folder(tmp_path_factory.mktemp("images"), images=20)
    return (
        *("dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=16", "trainer.batch_size=4"),
        *("method=moco", "method.queue_size=20", "method.batchnorm_groups=2", "trainer.workers=0"),
    )


@pytest.mark.parametrize(
    "choice", ["memory", "streamed", slow("accumulated"), slow("fp16"), slow("evaluated and saved")]
)
def test_logged_shares_of_time_sum_to_one(choice, streamed, tmp_path):
    recipe = {
        "memory": SIMCLR,
        "streamed": streamed,
        "accumulated": (*MOCO_VIT, "trainer.accumulate_steps=2"),
        "fp16": (*MOCO, "trainer.precision=fp16"),
        "evaluated and saved": (*MOCO, "evaluation.knn_every_epochs=0.4", "trainer.save_every_steps=1"),
    }[choice]
    run = finish(tmp_path / "run", *recipe)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == (8 if choice == "streamed" else 10)
    for line in logged:
        times = {name: value for name, value in line.items() if name.startswith("time_")}
        assert sum(times.values()) == pytest.approx(1)
        assert times.keys() <= {f"time_{part}" for part in PARTS}
        assert {"time_data", "time_views", "time_forward", "time_backward", "time_optimizer"} <= times.keys()
        assert all(value >= 0 for value in times.values())
    assert all(line["images_per_second"] > 0 for line in logged[1:])
    if choice == "evaluated and saved":
        assert any("time_evaluation" in line for line in logged)
        assert all("time_saving" in line for line in logged[1:])
