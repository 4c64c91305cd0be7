"""scripts/fuzz_commands: what it takes for a fault of a command line, and a few of its lines for real."""

import contextlib
import random
import sys

import pytest

from tests.processes import status_of
from tests.runs import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import fuzz_commands
import random_commands

REFUSED = "sslctl: trainer.epochs=abc: expected a whole number, found a word"


def line(status, err="", changed=()):
    return fuzz_commands.Line(["pretrain"], status, "", err, list(changed))


@pytest.mark.parametrize("ended", [line(0), line(2, REFUSED), line(None), line(1, "sslctl: the loss is not finite")])
def test_what_is_in_order_has_no_fault(ended):
    assert fuzz_commands.faults_of(ended) == []


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (line(1, "sslctl: no"), "failed while running"),
        (line(-11, ""), "status -11"),
        (line(2, "sslctl: object of type 'int' has no len()"), "exception: object of type"),
        (line(0, "Traceback (most recent call last):"), "exception: Traceback"),
        (line(2, "sslctl: KeyError: 'a'"), "exception: KeyError"),
        (line(2, "sslctl: <urlopen error [Errno 111] Connection refused>"), "exception: <urlopen"),
        (line(2, ""), "refused in 0 lines"),
        (line(2, "\n".join([REFUSED] * 13)), "refused in 13 lines"),
        (line(2, f"sslctl: {'x' * 500}"), "508 characters"),
        (line(2, "usage: sslctl"), "not sslctl's own words"),
        (line(2, REFUSED, ["cwd/runs"]), "left cwd/runs"),
    ],
)
def test_what_is_not_in_order_is_named(ended, fault):
    assert any(fault in actual for actual in fuzz_commands.faults_of(ended))


def test_a_line_of_a_seed_is_always_the_same_and_seeds_differ():
    first, again, other = (random_commands.command(random.Random(f"{seed}-3")) for seed in (1, 1, 2))
    assert first == again != other


def run_some(place) -> None:
    with (place / "said").open("w") as printed, contextlib.redirect_stdout(printed):
        sys.exit(fuzz_commands.main(["--file", str(place / "lines"), "--jobs", "1"]))


def test_lines_that_are_right_wrong_and_faulty_are_told_apart(tmp_path):
    (tmp_path / "lines").write_text(
        "runs\nviews images=[1\npretrain --cfg job\nviews ''out='x.png' trainer.epochs=${a}\n"
    )
    assert status_of(run_some, tmp_path) == 0, (tmp_path / "said").read_text()
    printed = (tmp_path / "said").read_text()
    assert "1 status 0, 3 status 2; 0 not in order" in printed
