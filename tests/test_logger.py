"""Log: each step once on TensorBoard, whatever an earlier process had shown; its files in the order in which they were made."""

from types import SimpleNamespace

import pytest
from kill_traces import points

from sslctl.training import logger
from sslctl.training.logger import Log, move_events_back

PLAN = SimpleNamespace(total_steps=20, steps_per_epoch=5, epochs=4, batch_size=8)


def log(run, first_step=0, *, evaluating=False):
    return Log(run, PLAN, first_step, tensorboard=True, evaluating=evaluating)


def train(opened, *steps):
    for step in steps:
        opened.record(step, {"loss": 1.0 + step})


def test_an_evaluation_is_shown_before_its_line_is_written(tmp_path, monkeypatch):
    """By the line it counts as done: a kill in between would leave it out for ever. Points are written by a thread."""
    order = []
    monkeypatch.setattr(logger, "append_metrics", lambda path, record: order.append(record["step"]))
    with log(tmp_path) as opened:
        monkeypatch.setattr(opened.writer, "flush", lambda: order.append("shown"))
        train(opened, 1)
        opened.record(2, {"rankme": 3.0, "knn": 0.5})
        assert order == [1, "shown", 2]


@pytest.mark.parametrize("evaluating", [True, False])
def test_each_step_is_shown_once_after_a_kill(evaluating, tmp_path, monkeypatch):
    """Two steps after an evaluation's line, or before that line, when the evaluation is to come again (evaluating)."""
    with log(tmp_path) as opened, monkeypatch.context() as patch:
        train(opened, 1, 2, 3, 4, 5)
        if not evaluating:
            opened.record(5, {"rankme": 3.0, "knn": 0.5})
        patch.setattr(logger, "append_metrics", lambda path, record: None)  # lost, or cut off by the resume
        if evaluating:
            opened.record(5, {"rankme": 3.0, "knn": 0.5})
        train(opened, 6, 7)
    with log(tmp_path, 5, evaluating=evaluating) as opened:
        if evaluating:
            opened.record(5, {"rankme": 3.0, "knn": 0.5})
        train(opened, 6)
    shown = points(tmp_path)
    assert shown["knn"] == [(5, 0.5)]
    assert shown["loss"] == [(step, 1.0 + step) for step in (1, 2, 3, 4, 5, 6)]


def test_earlier_files_come_before_a_new_one_in_their_order(tmp_path, monkeypatch):
    seconds = (998, 999, 1000, 4600)  # the last before the clock was set back
    for second in seconds:
        (tmp_path / f"events.out.tfevents.{second:010}.host.1.0").write_text(str(second))
    monkeypatch.setattr(logger.time, "time", lambda: 1000.5)
    move_events_back(tmp_path)
    new = tmp_path / "events.out.tfevents.0000001000.host.2.0"
    new.write_text("new")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == [*map(str, seconds), "new"]
