"""Results belong to the images that they were measured on, wherever a command is said and however folders are called."""

import os

import pytest
import yaml

from sslctl.report.measurement import distinguishing_settings, measurement_of
from sslctl.runs.health import judge
from sslctl.runs.history import RunFacts
from sslctl.runs.intervals import wilson_noise
from tests.conftest import QUICK, write_images
from tests.runs import blank_result, results

KNN = ("cache=false", "device=cpu")


def test_results_of_two_folders_of_one_name_never_mix(cli, workdir, monkeypatch):
    for place, size in (("here", (16, 16)), ("there", (24, 24))):
        write_images(workdir / place / "photos", "train/a", "train/b", "test/a", "test/b", size=size, seed=len(place))
    monkeypatch.chdir(workdir / "here")
    words = ("dataset=imagefolder", "dataset.root=photos")
    assert cli("pretrain", *QUICK, *words, "run_dir=../run").status == 0
    config = yaml.safe_load((workdir / "run" / "config.yaml").read_text())
    assert (config["dataset"]["root"], config["as_typed"]) == (
        str(workdir / "here" / "photos"),
        {"dataset.root": "photos"},
    )

    # Elsewhere, where there is a folder of the same relative path: the run's own is judged on, the other one where it is named.
    # That one has larger images, which are taken in the run's size.
    monkeypatch.chdir(workdir / "there")
    own, other = cli("knn-eval", "../run", *KNN), cli("knn-eval", "../run", *KNN, *words)
    assert (own.status, other.status) == (0, 0), own.err + other.err
    lines = [line for line in results(workdir / "run" / "results.jsonl") if line["metric"] == "top1"]
    assert {line["dataset"] for line in lines} == {"photos"}
    assert len({line["content"] for line in lines}) == 2
    assert len({line["classes"] for line in lines}) == 1
    for subject in ("trained", "random"):
        mine = [
            blank_result(**{k: v for k, v in line.items() if k != "format"})
            for line in lines
            if line["subject"] == subject
        ]
        columns = [measurement_of(result) for result in mine]
        assert len(set(columns)) == 2
        assert {words[:6] for words in distinguishing_settings(columns).values()} == {"images"}

    # The folder has moved with its project: it is found where it was typed, seen from here.
    os.rename(workdir / "here", workdir / "moved")
    monkeypatch.chdir(workdir / "moved")
    assert cli("knn-eval", "../run", *KNN).status == 0


def measured(subject, value, images=100, **changes):
    values = {
        "protocol": "knn",
        "metric": "top1",
        "value": value,
        "images": images,
        "subject": subject,
        "params": {"k": 1},
    }
    return blank_result(**values | {"content": "abc", "classes": "ab"} | changes)


@pytest.mark.parametrize(
    ("trained", "random", "images", "other", "worse"),
    [
        (0.70, 0.75, 40, {}, False),  # two images: a fixed margin would say so
        (0.70, 0.90, 40, {}, True),
        (0.740, 0.755, 50_000, {}, True),  # of so many images, less than a fixed margin
        (0.10, 0.90, 400, {"content": "xyz"}, False),  # of other images
        (0.10, 0.90, 400, {"classes": "xy"}, False),
    ],
)
def test_a_run_is_worse_than_untrained_where_chance_does_not_explain_it(trained, random, images, other, worse):
    facts = RunFacts(steps_per_epoch=10, total_steps=1000)
    records = [{"step": step, "loss": 5 - step / 500} for step in range(10, 1001, 10)]
    actual = judge(records, facts, [measured("trained", trained, images), measured("random", random, images, **other)])
    assert any(finding.rule == "random" for finding in actual) == worse


def test_the_noise_of_two_shares_is_that_of_their_intervals():
    assert wilson_noise(0.5, 0.5, 10_000) == pytest.approx(1.96 * (2 * 0.25 / 10_000) ** 0.5, rel=1e-3)
    assert wilson_noise(1.0, 1.0, 4) == pytest.approx(2**0.5 * (1 - 0.5101) / 2, abs=1e-3)
    assert wilson_noise(0.5, 0.5, None) == 0.02
