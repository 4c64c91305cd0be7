"""The weights that a run began with: kept with it, measured as `given`, compared with first, and named by its report."""

import pytest
import torch

from sslctl.cli import main
from sslctl.models.backbones import SmallResNet
from sslctl.report.groups import columns_of
from sslctl.report.run import read_run
from sslctl.report.summary import summary_of_one
from sslctl.report.tables import results_of
from sslctl.runs.results import Result, read_results
from tests.runs import PROBE, SIMCLR, blank_result, finish, newest

NETWORK = ("backbone=small_resnet", "backbone.widths=[4,8]")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run from weights in a file that is gone."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(7)
    file = folder / "mine.pt"
    torch.save({"state_dict": SmallResNet([4, 8], 1, 0, "batch", 1, 8).state_dict()}, file)
    words = (*SIMCLR, *NETWORK, f"backbone.weights={file}", "evaluation.closing=true", *PROBE)
    finish(folder / "run", *words)
    measured = folder / "file.jsonl"
    again = ("dataset=digits", "dataset.image_size=8", "device=cpu", "cache=false", "knn.k=3")
    assert main(["knn-eval", *NETWORK, f"backbone.weights={file}", *again, f"out={measured}"]) == 0
    file.unlink()
    return folder / "run"


def knn(path, subject):
    return next(r for r in read_results(path) if (r.protocol, r.subject, r.metric) == ("knn", subject, "top1"))


def test_the_closing_table_shows_given_weights_beside_trained_and_random_ones(run):
    results = read_results(run / "results.jsonl")
    assert list(dict.fromkeys(r.subject for r in results)) == ["trained", "given", "random"]
    digests = {r.subject: r.weights_sha256 for r in results}
    assert len(set(digests.values())) == 3


def test_given_weights_are_measured_without_their_file(run, tmp_path):
    words = ("device=cpu", "cache=false", "knn.k=3")
    assert main(["knn-eval", str(run), *words, f"out={tmp_path}/o.jsonl"]) == 0
    assert {r.subject for r in read_results(tmp_path / "o.jsonl")} == {"trained", "given", "random"}
    # The same as of the file itself, evaluated when it was there.
    assert knn(tmp_path / "o.jsonl", "given").value == knn(run.parent / "file.jsonl", "given").value
    assert {r.subject for r in read_results(run.parent / "file.jsonl")} == {"given", "random"}
    kept = run / "given.safetensors"
    kept.rename(tmp_path / "kept")
    try:
        assert main(["knn-eval", str(run), *words, "subjects=[given]", f"out={tmp_path}/o.jsonl"]) == 2
        assert main(["knn-eval", str(run), *words, f"out={tmp_path}/p.jsonl"]) == 0
        assert {r.subject for r in read_results(tmp_path / "p.jsonl")} == {"trained", "random"}
    finally:
        (tmp_path / "kept").rename(kept)


def test_the_report_names_the_weights_that_a_run_began_with(run):
    read = read_run(run, newest(run), "run")
    summary = summary_of_one(read, columns_of([read]))
    assert f"It began with given weights: {run.parent}/mine.pt." in summary.sentences
    figure = next(f for f in summary.figures if f.protocol.startswith("knn"))
    assert figure.beside.startswith(f"given weights: {100 * knn(run / 'results.jsonl', 'given').value:.2f} %")
    table = results_of(read)
    assert table["subjects"] == ["trained", "given", "random"]
    assert table["given"] == f"{run.parent}/mine.pt"


def test_lines_of_earlier_versions_are_read_as_given():
    line = vars(blank_result(subject="foreign"))
    assert Result.from_line(line).subject == "given"
