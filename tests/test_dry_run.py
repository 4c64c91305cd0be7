"""plan_only=true: what a run will cost, and nothing written."""

from types import SimpleNamespace

import pytest

import sslctl.ops.timing
import tests.own_methods
from tests.methods import words_of
from tests.own_methods import own
from tests.runs import MOCO, SIMCLR, SUPERVISED, pretrain, slow
from tests.test_timing import MOCO_VIT

# --- plan_only=true ---


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        *((SIMCLR, 10), ((*MOCO, "trainer.epochs=1", "trainer.batch_size=1000"), 1)),
        *(slow((*MOCO, "trainer.epochs=2", "trainer.batch_size=1000"), 2), slow((*MOCO, "trainer.epochs=4"), 20)),
        slow((*MOCO, "trainer.epochs=3", "trainer.batch_size=1000"), 3),
        slow((*MOCO, "trainer.epochs=4", "trainer.batch_size=1000"), 4),
        slow((*MOCO_VIT, "trainer.accumulate_steps=4", "trainer.precision=fp16"), 10),
        slow(SUPERVISED, 10),
    ],
)
def test_a_plan_tells_what_a_run_will_cost_and_writes_nothing(recipe, steps, workdir, capsys):
    assert pretrain(workdir / "run", *recipe, "plan_only=true") == 0
    printed = capsys.readouterr().out
    (cost,) = [line for line in printed.splitlines() if line.startswith("time ")]
    assert "ms a step" in cost
    assert "images/s" in cost
    (spent,) = [line for line in printed.splitlines() if line.startswith("spent on ")]
    percents = {w.rsplit(" ", 2)[0]: int(w.split()[-2]) for w in spent.removeprefix("spent on   ").split(", ")}
    assert percents.keys() == {"data", "views", "forward", "backward", "optimizer"}
    assert abs(sum(percents.values()) - 100) <= 3
    (memory,) = [line for line in printed.splitlines() if line.startswith("memory ")]
    assert "a checkpoint takes" in memory
    assert f"{steps} = " in printed
    assert list(workdir.iterdir()) == []


def test_the_time_of_a_plan_is_that_of_a_step(workdir, capsys, monkeypatch):
    """On a clock that moves where the method sleeps, and only there."""
    now = [100.0]
    monkeypatch.setattr(sslctl.ops.timing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sleep = SimpleNamespace(sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(tests.own_methods, "time", sleep)
    assert pretrain(workdir / "run", *MOCO, *own("NappingMoCo"), "trainer.epochs=4", "plan_only=true") == 0
    (cost,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time ")]
    assert cost.split()[1:5] == ["50", "ms", "a", "step,"]  # the first steps, which take longer, are left out


# --- What does not fit ---


def test_a_plan_embeds_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sslctl.evaluation.online.extract", lambda *args, **keywords: pytest.fail("embedded"))
    words = (*words_of("deepcluster_v2"), "plan_only=true")
    assert pretrain(tmp_path / "run", *words) == 0
    assert "images/s" in capsys.readouterr().out


def test_a_plan_begins_an_epoch_all_the_same(tmp_path, capsys):
    """A user's method may not be able to take a step otherwise."""
    assert pretrain(tmp_path / "run", *SIMCLR, *own("BeginningSimCLR"), "plan_only=true") == 0
    assert "images/s" in capsys.readouterr().out
