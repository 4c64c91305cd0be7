"""The short form of scripts/kill_campaign: a few kills, and that a difference is noticed."""

import copy
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from kill_campaign import Undisturbed, try_case
from kill_cases import Case, Kill, drawn_cases
from kill_traces import compare

TERM, KILL, INT = signal.SIGTERM, signal.SIGKILL, signal.SIGINT
CASES = [
    Case(
        "moco", 1, 2, (Kill("training", 3, 0.01, "group", TERM, None), Kill("saving", 8, 0.003, "command", KILL, None))
    ),
    Case(
        "moco",
        2,
        None,
        (Kill("starting", 1, 0.2, "command", INT, None), Kill("evaluating", 5, 0.01, "command", KILL, None)),
    ),
]


@pytest.fixture(scope="module")
def place():
    """A folder with a short name: the sockets in a temporary folder below it may have no long one."""
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="module")
def undisturbed(place):
    return Undisturbed(place)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_is_killed_comes_out_as_one_that_is_not(case, undisturbed, place):
    in_time, wrong = try_case(case, undisturbed, place / f"case-{CASES.index(case)}")
    assert wrong == []
    assert any(in_time)


def test_cases_are_the_same_for_a_seed_and_have_the_kills_that_were_asked_for():
    cases = drawn_cases(1, 40)
    assert cases == drawn_cases(1, 40) != drawn_cases(2, 40)
    assert sum(len(case.kills) for case in cases) == 40


TRACES = {
    "tensors": {"method/weight": torch.zeros(2)},
    "metrics.jsonl": [{"step": 1, "loss": 0.5}],
    "TensorBoard": {"loss": [(1, 0.5)]},
    "results.jsonl": [("trained", "knn", "top-1", 0.5, "ab")],
    "files": ["last"],
    "temporary folder": [],
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("tensors", lambda actual: actual["method/weight"].add_(1e-7)),
        ("metrics.jsonl", lambda actual: actual.append(actual[0])),
        ("TensorBoard", lambda actual: actual["loss"].append((1, 0.5))),
        ("results.jsonl", list.clear),
        ("files", lambda actual: actual.append(".step-2.writing")),
        ("temporary folder", lambda actual: actual.append("sslctl.sweep.abcdefgh")),
    ],
)
def test_every_difference_is_noticed(kind, change):
    left = copy.deepcopy(TRACES)
    assert compare(left, TRACES) == []
    change(left[kind])
    (line,) = compare(left, TRACES)
    assert kind in line
