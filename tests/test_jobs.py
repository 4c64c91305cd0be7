"""How the jobs of a sweep ended: what they leave behind, and what the sweep makes of it."""

import importlib.util

import pytest

from sslctl.config.jobs import Outcome, outcomes_in, record, summary, worst
from tests.conftest import QUICK


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([], 0), ([0, 0], 0), ([0, 2], 2), ([2, 0], 2), ([2, 1, 0], 1), ([1, 2], 1), ([1, 143, 2], 143)],
)
def test_a_sweep_ends_with_the_worst_status_of_its_jobs(statuses, expected):
    assert worst([Outcome(n, "", status) for n, status in enumerate(statuses)]) == expected


def test_jobs_leave_how_they_ended_in_their_order_and_the_last_word_counts(tmp_path):
    for number in (10, 2, 1):
        record(tmp_path, Outcome(number, f"seed={number}", 1, "its process ended without a word"))
    record(tmp_path, Outcome(2, "seed=2", 0))
    assert [(o.number, o.status) for o in outcomes_in(tmp_path)] == [(1, 1), (2, 0), (10, 1)]


def test_the_summary_says_of_each_job_that_failed_why_and_how():
    first, *rest = summary([Outcome(0, "seed=0", 0), Outcome(1, "seed=1", 2, "no such thing"), Outcome(2, "seed=2", 1)])
    assert first.startswith("2 of the sweep's 3 jobs failed; its status is 1")
    assert rest == ["  job 1, status 2 (seed=1): no such thing", "  job 2, status 1 (seed=2): "]
    assert summary([Outcome(0, "seed=0", 0)]) == []
    two = [Outcome(0, "a=1 seed=0", 0), Outcome(1, "a=1 seed=1", 2, "no")]  # what all have in common tells none apart
    assert summary(two)[1:] == ["  job 1, status 2 (seed=1): no"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("hydra_plugins"), reason="hydra-joblib-launcher is not installed")
def test_jobs_that_joblib_starts_in_other_processes_count_where_they_fail(spawn):
    """All that a job is told goes there by pickle, and what it leaves comes back through its file."""
    words = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *QUICK, "trainer.batch_size=700,5000")
    result = spawn("pretrain", *words, timeout=300)
    assert result.status == 2, result.err
    assert "1 of the sweep's 2 jobs failed; its status is 2" in result.err
    assert "job 1, status 2 (trainer.batch_size=5000): 0 steps per epoch" in result.err
    assert "Traceback" not in result.err
    assert result.out.count("done: runs/digits/simclr-mlp-") == 1
