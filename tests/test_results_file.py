"""results.jsonl: what is written is read back, lines of before there was a format too; what is no result is refused."""

import dataclasses
import json

import pytest

from sslctl.errors import InputError
from sslctl.runs.results import Result, append_results, read_results
from tests.runs import blank_result

RESULT = blank_result(
    protocol="knn", metric="top1", value=0.5, subject="trained", ci95=[0.4, 0.6], params={"k": 20, "bank": 90}, step=10
)


def test_results_are_read_back_as_they_were_written(tmp_path):
    drawn = dataclasses.replace(RESULT, std=0.01, draws=5)
    path = tmp_path / "deep" / "results.jsonl"
    append_results(path, [RESULT])
    append_results(path, [drawn, RESULT])
    assert read_results(path) == [RESULT, drawn, RESULT]
    one, several, _ = (json.loads(line) for line in path.read_text().splitlines())
    assert one["format"] == several["format"] == 1
    assert one.keys() == several.keys() - {"std", "draws"}
    assert read_results(tmp_path / "none.jsonl") == []


def test_only_a_figure_of_an_unusual_protocol_says_that_it_is_no_share():
    figure = dataclasses.replace(RESULT, share=False)
    free, own = (dataclasses.replace(figure, protocol=protocol) for protocol in ("label-free", "mine"))
    lines = [json.loads(result.to_json()) for result in (RESULT, free, own)]
    assert ["share" in line for line in lines] == [False, False, True]
    assert [Result.from_line(line) for line in lines] == [RESULT, free, own]


def test_a_line_that_a_kill_cut_off_is_overwritten(tmp_path):
    path = tmp_path / "results.jsonl"
    append_results(path, [RESULT])
    path.write_text(path.read_text() + RESULT.to_json()[:40])
    assert read_results(path) == [RESULT]
    append_results(path, [RESULT])
    assert read_results(path) == [RESULT, RESULT]


def test_a_line_without_a_format_is_of_the_first(tmp_path):
    line = json.loads(RESULT.to_json())
    line.pop("format")
    assert Result.from_line(line) == RESULT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "results of format 2 are not known, only of format 1"),
        ({"metric": ...}, "no result of format 1: without metric"),
        ({"what": 1}, "no result of format 1: with unknown what"),
        ({"what": 1, "value": ..., "time": ...}, "no result of format 1: without time, value and with unknown what"),
    ],
)
def test_what_is_no_result_is_refused_with_its_line(tmp_path, changes, words):
    line = {key: value for key, value in (json.loads(RESULT.to_json()) | changes).items() if value is not ...}
    path = tmp_path / "results.jsonl"
    path.write_text(RESULT.to_json() + "\n" + json.dumps(line) + "\n")
    with pytest.raises(InputError, match=rf"results.jsonl line 2: {words}$"):
        read_results(path)
