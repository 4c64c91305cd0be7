"""sslctl report: the page says what the run's files say, stands alone, and is refused in one line where it cannot be made."""

import html
import json
import re
import shlex
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from sslctl.cli import main
from sslctl.report import commands
from sslctl.report import measurement as measured
from sslctl.report import run as recorded
from sslctl.runs import checkpoint, health
from sslctl.runs.reading import read_lines
from sslctl.runs.results import Result
from tests.browser import DESKTOP, PHONE, browser, needs_chromium
from tests.conftest import QUICK, write_images
from tests.runs import forget_run, pretrain, unsigned, without_checksum

METHODS, SEEDS = ("simclr", "dcl"), (0, 1)
CLASSES = ("a<b>", "c&d")
FAST = ("map_images=40", "images=3", "neighbours=4", "device=cpu", "cache=false")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two methods with two seeds each on 2 × 24 labelled images, evaluated. To be read only."""
    root = tmp_path_factory.mktemp("sweep")
    write_images(root / "images", *(f"{split}/{name}" for split in ("train", "test") for name in CLASSES), count=24)
    for method in METHODS:
        for seed in SEEDS:
            words = [
                *QUICK,
                f"method={method}",
                f"seed={seed}",
                "dataset=imagefolder",
                f"dataset.root={root / 'images'}",
            ]
            words += ["trainer.epochs=3", "trainer.log_every_steps=1", "evaluation.closing=true", "probe.epochs=2"]
            words += ["evaluation.knn_every_epochs=1", f"run_dir={root / 'runs' / f'{method}-{seed}'}"]
            assert main(["pretrain", *words]) == 0
    return root / "runs"


@pytest.fixture
def page(cli, workdir):
    """page(*words): the text of the page that a report writes."""

    def make(*words) -> str:
        out = workdir / "page.html"
        result = cli("report", *words, *FAST, f"out={out}")
        assert result.status == 0, result.err
        assert str(out) in result.out
        assert out.stat().st_size < 10 * 2**20
        make.printed = result.out
        return out.read_text()

    return make


def text(page: str) -> str:
    """The words of a page, without its pictures, style and script."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def data_of(page: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def results(run: Path, subject: str, protocol: str, metric: str = "top1") -> dict:
    records = read_lines(run / "results.jsonl")
    (actual,) = [r for r in records if (r["subject"], r["protocol"], r["metric"]) == (subject, protocol, metric)]
    return actual


class Balance(HTMLParser):
    """Fails on a tag that is closed and was not opened, or the other way round."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.unnamed = [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        if (tag == "img" and not given.get("alt")) or (given.get("role") == "img" and not given.get("aria-label")):
            self.unnamed.append(tag)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def check(page: str) -> None:
    """Well-formed, every picture with words, and nothing from elsewhere."""
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert parser.unnamed == []
    assert not re.search(r"https?:|//[a-z]|@import|\bfetch\(|XMLHttpRequest", re.sub(r"base64,[^)\"]*", "", page))
    for address in re.findall(r"(?:src|href)=\"([^\"]*)\"", page) + re.findall(r"url\(([^)]*)\)", page):
        assert address.startswith(("#", "data:")), address[:80]


# --- One run ---


@pytest.mark.slow
def test_the_page_of_a_run_says_what_its_files_say(page, sweep):
    run = sweep / "simclr-0"
    built = page(run)
    check(built)
    output = text(built)
    for subject in ("trained", "random"):
        for protocol in ("knn", "linear-cached"):
            assert f"{100 * results(run, subject, protocol)['value']:.2f} %" in output
    assert "linear-cached, top1, all labels, images test split (48 images)" in output
    assert "simclr trained mlp on 48 images of imagefolder images for 3 of 3 epochs (9 of 9 steps)" in output
    environment = json.loads((run / "environment.json").read_text())
    assert all(f"{name} {version}" in output for name, version in environment["versions"].items())
    assert environment["hashes"]["data"] in output


def test_the_page_says_which_features_are_evaluated(page, sweep):
    offered = "the method offers backbone, projector"
    assert f"features results are of backbone; {offered}" in text(page(sweep / "simclr-0"))
    other = text(page(sweep / "simclr-0", "features=projector"))
    assert f"features results are of backbone; neighbours and map are of projector; {offered}" in other
    alone = text(page(sweep / "simclr-0", sweep / "dcl-0", "detailed=1"))
    assert alone.count("features results are of backbone") == 2
    assert alone.count(offered) == 1


def test_the_curves_hold_what_was_logged(page, sweep):
    charts = data_of(page(sweep / "simclr-0"))["charts"]
    logged = [json.loads(line) for line in (sweep / "simclr-0" / "metrics.jsonl").read_text().splitlines()]
    for name, factor in (("loss", 1), ("lr", 1), ("feature_std", 1), ("knn", 100)):
        expected = [(r["epoch"], factor * r[name]) for r in logged if name in r]
        (series,) = charts[name]["series"]
        assert len(expected) >= 4
        np.testing.assert_allclose(series["points"], expected, rtol=1e-4, atol=1e-3)


def test_the_confusion_matrix_counts_as_the_recorded_knn_does(page, sweep):
    built = page(sweep / "dcl-1")
    right, total = map(int, re.search(r"(\d+) of (\d+) right", text(built)).groups())
    assert total == 48
    assert right / total == pytest.approx(results(sweep / "dcl-1", "trained", "knn")["value"])
    cells = [int(n) for n in re.findall(r"taken for [^:]*: (\d+) of 24\"", built)]
    assert len(cells) == 4
    assert cells[0] + cells[3] == right
    assert sum(cells) == total


def test_names_of_classes_are_never_markup(page, sweep):
    built = page(sweep / "simclr-0")
    assert "a<b>" not in built
    assert "a&lt;b&gt;" in built
    assert data_of(built)["maps"]["0"]["kinds"] == list(CLASSES)


def test_the_page_lies_in_the_run_unless_told_otherwise(cli, sweep, workdir):
    shutil.copytree(sweep / "simclr-0", workdir / "copy")
    result = cli("report", "copy", *FAST)
    assert result.status == 0, result.err
    written = (workdir / "copy" / "report.html").resolve()
    assert re.search(rf"{re.escape(str(written))}: 1 run, \d\.\d MiB", result.out)
    assert written.exists()


def test_a_run_without_labels_is_told_what_to_label(page, workdir):
    write_images(workdir / "photos", count=40)
    words = ["dataset=folder", "dataset.root=photos", "trainer.log_every_steps=1", f"run_dir={workdir / 'run'}"]
    assert main(["pretrain", *QUICK, *words]) == 0
    built = page("run")
    check(built)
    output = text(built)
    assert "There are no labels, so nothing here measures accuracy" in output
    assert (
        f"sslctl linear-eval {workdir / 'run'} labels=5 dataset=imagefolder dataset.root=FOLDER dataset.image_size=16"
        in output
    )
    assert "Who is taken for whom" not in output
    assert data_of(built)["maps"]["0"]["kinds"] == ["images"]
    assert {name.partition("/")[0] for name in data_of(built)["names"]} == {"photos"}


def test_an_unfinished_run_is_called_so_and_continued(page, workdir):
    assert pretrain(workdir / "run", stop_after=6) == 143
    built = page("run")
    check(built)
    output = text(built)
    assert "for 1.2 of 2 epochs (6 of 10 steps); it is not finished" in output
    assert "Continue it where it stopped" in output
    assert "Who is taken for whom" in output


def test_a_method_with_pictures_shows_them(page, workdir):
    words = ["method=autoencoder", "backbone=small_resnet", "backbone.widths=[4,8]", f"run_dir={workdir / 'run'}"]
    words += ["trainer.batch_size=256"]
    assert main(["pretrain", *QUICK, *words]) == 0
    built = page("run")
    check(built)
    assert "What the method makes" in text(built)
    assert "reconstruction of image 3" in built


def test_images_that_are_gone_cost_the_page_its_pictures_only_which_is_said(page, sweep, workdir):
    shutil.copytree(sweep / "simclr-0", workdir / "copy")
    config = workdir / "copy" / "config.yaml"
    config.write_text(without_checksum(config).replace(str(sweep.parent / "images"), str(workdir / "gone")))
    output = text(page("copy"))
    assert "left out: features and pictures: The images are not where they were" in page.printed
    assert "The images are not where they were" in output
    assert "no such folder" in output
    assert f"{100 * results(sweep / 'simclr-0', 'trained', 'knn')['value']:.2f} %" in output


def test_results_of_any_protocol_are_shown_with_their_interval(page, sweep, workdir):
    shutil.copytree(sweep / "simclr-0", workdir / "copy")
    known = results(sweep / "simclr-0", "trained", "knn")
    with (workdir / "copy" / "results.jsonl").open("a") as opened:
        for protocol, metric, value, interval in (
            ("cluster", "nmi", 0.4321, [0.40, 0.46]),
            ("label-free", "rankme", 17.256, [16.1, 18.9]),
        ):
            built = {"protocol": protocol, "metric": metric, "value": value, "ci95": interval, "labels": "none"}
            built |= {"params": {"images": 48}, "details": {"healthy": "more is better"}}
            opened.write(json.dumps(known | built) + "\n")
    output = text(page("copy"))
    assert re.search(r"cluster nmi none 43\.21 % .*40\.0–46\.0 %", output)
    assert re.search(r"RankMe 17\.26 more is better 48 images of images, test", output)
    assert "none labels" not in output
    assert "no training" not in output
    assert "1725.6" not in output


# --- Several runs ---


def test_means_and_deviations_over_seeds_are_those_of_the_files(page, sweep):
    built = page(sweep)
    check(built)
    output = text(built)
    for method in METHODS:
        for protocol in ("knn", "linear-cached"):
            values = [100 * results(sweep / f"{method}-{s}", "trained", protocol)["value"] for s in SEEDS]
            assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} %" in output
    assert "4 runs on imagefolder images: 2 settings, 2 seeds each" in output
    assert re.search(r"names.method dcl simclr", output)


def test_every_run_of_a_sweep_can_be_repeated(page, sweep):
    commands = [html.unescape(c) for c in re.findall(r"<pre tabindex=\"0\">(.*?)</pre>", page(sweep), re.DOTALL)]
    for method in METHODS:
        for seed in SEEDS:
            (command,) = [c for c in commands if c.endswith(f"run_dir=repeated/{method}-{seed}")]
            words = shlex.split(command)
            assert {f"method={method}", f"seed={seed}", "trainer.threads=1"} <= set(words)
            assert words[:2] == ["cd", str(Path.cwd())] or words[0] == "cd"
            assert any(f"knn-eval {sweep / f'{method}-{seed}'} knn.k=48 knn.temperature=0.1" in c for c in commands)


def test_unfinished_runs_are_left_out_of_means(page, sweep, workdir):
    shutil.copytree(sweep, workdir / "runs")
    stopped = workdir / "runs" / "simclr-1"
    environment = unsigned(stopped / "environment.json")
    environment["facts"]["total_steps"] += 1
    (stopped / "environment.json").write_text(json.dumps(environment))
    output = text(page("runs"))
    assert "1 of them is not finished and left out of every mean: simclr-1" in output
    assert "simclr 1 of 2" in output
    values = [100 * results(sweep / f"dcl-{s}", "trained", "knn")["value"] for s in SEEDS]
    assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} %" in output
    values = [100 * results(sweep / f"simclr-{s}", "trained", "knn")["value"] for s in SEEDS]
    assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} %" not in output


@pytest.mark.slow
def test_the_command_of_a_row_gives_the_same_weights_again(page, sweep, spawn, workdir):
    commands = [html.unescape(c) for c in re.findall(r"<pre tabindex=\"0\">(.*?)</pre>", page(sweep), re.DOTALL)]
    (command,) = [c for c in commands if c.endswith("run_dir=repeated/dcl-1")]
    words = shlex.split(command.partition("&& sslctl ")[2])
    again = spawn(*words)
    assert again.status == 0, again.err
    paths = [checkpoint.newest_valid(run) for run in (sweep / "dcl-1", workdir / "repeated" / "dcl-1")]
    before, after = (checkpoint.load_tensors(path / "weights.safetensors") for path in paths)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- Bad input ---


@pytest.fixture
def places(workdir, sweep):
    """A folder that is no run, a run without a checkpoint, a file, somebody's page, and a run on other images."""
    (workdir / "empty").mkdir()
    (workdir / "file").write_text("no folder")
    (workdir / "mine.html").write_text("<html>mine</html>")
    (workdir / "bare").mkdir()
    for name in ("config.yaml", "environment.json", "preprocess.json"):
        shutil.copy(sweep / "simclr-0" / name, workdir / "bare" / name)
    shutil.copytree(sweep / "simclr-0", workdir / "pair" / "one")
    shutil.copytree(sweep / "simclr-1", workdir / "pair" / "other")
    forget_run(workdir / "pair" / "other")  # else its checkpoint says what the images were
    other = workdir / "pair" / "other" / "environment.json"
    other.write_text(json.dumps(unsigned(other)).replace('"data": "', '"data": "f'))
    return workdir


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("", ("no run to report on", "sslctl report runs/latest")),
        ("nowhere", ("ckpt=nowhere", "no such run")),
        ("empty", ("ckpt=empty", "no run directory there")),
        ("file", ("ckpt=file", "is a file")),
        ("bare", ("bare", "no valid checkpoint")),
        ("pair", ("trained on different images", "one on imagefolder", "other on imagefolder", "48")),
        ("pair/one out=page.pdf", ("out=page.pdf", ".html")),
        ("pair/one out=empty", ("out=empty", ".html")),
        ("pair/one out=mine.html", ("out=mine.html", "sslctl report did not write")),
        ("pair/one out=file/page.html", ("out=file/page.html", "not a directory")),
        ("pair/one images=0", ("images=0", "at least 1")),
        ("pair/one features=nose", ("features=nose", "backbone")),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(cli, places, words, fragments):
    before = sorted(places.rglob("*"))
    result = cli("report", *words.split())
    assert result.status == 2, result
    assert len(result.err.splitlines()) == 1
    assert all(fragment in result.err for fragment in fragments), result.err
    assert sorted(places.rglob("*")) == before


# --- Results by different settings ---


def add_results(run: Path, *records: dict) -> None:
    with (run / "results.jsonl").open("a") as opened:
        opened.writelines(json.dumps(record) + "\n" for record in records)


def test_results_by_different_settings_are_never_averaged_or_compared(page, sweep, workdir):
    shutil.copytree(sweep, workdir / "runs")
    for seed in SEEDS:
        run = workdir / "runs" / f"dcl-{seed}"
        lines = read_lines(run / "results.jsonl")
        for record in lines:
            if record["protocol"] == "linear-cached":
                record["params"]["lr"] = [7.0]
        (run / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    built = page("runs")
    check(built)
    output = text(built)
    assert "lr [7.0]" in output
    assert "lr [0.01,0.03,0.1,0.3]" in output
    (ranked,) = re.findall(r"By the same protocol (.*?)\.", output)  # both have the same kNN
    assert "Random weights reach" in output
    assert "knn, k 48" in output.partition("Random weights reach")[2][:80]
    assert ranked
    shutil.rmtree(workdir / "runs" / "dcl-1")
    one = workdir / "runs" / "dcl-0" / "results.jsonl"
    one.write_text("".join(line + "\n" for line in one.read_text().splitlines() if '"knn"' not in line))
    output = text(page("runs"))
    assert re.search("Not measured by it, and so not compared: (dcl|simclr)", output)
    assert "By the same protocol" not in output


def test_means_of_settings_have_columns_of_their_own(sweep):
    actual = results(sweep / "simclr-0", "trained", "linear-cached")
    other = actual | {"params": actual["params"] | {"epochs": 99}}
    changed = actual | {"seed": 5, "details": {"picked": "others"}, "value": 0.1}
    one, two, same = (measured.measurement_of(Result.from_line(line)) for line in (actual, other, changed))
    assert one != two
    assert one == same
    assert measured.distinguishing_settings([one, two]) == {one: "epochs 2", two: "epochs 99"}
    assert measured.distinguishing_settings([one]) == {one: ""}


def test_main_results_come_first_and_the_rest_is_folded(page, sweep, workdir):
    shutil.copytree(sweep, workdir / "runs")
    for name in (f"{m}-{s}" for m in METHODS for s in SEEDS):
        known = results(sweep / name, "trained", "knn")
        none = {"labels": "none", "details": {"healthy": "near 1", "dim": 16}}
        add_results(
            workdir / "runs" / name,
            known | {"protocol": "retrieval", "metric": "map@100", "params": {}},
            known | {"params": known["params"] | {"k": 5}},
            known | {"protocol": "linear-cached", "labels": "5/class", "params": {"draws": 2}},
            known | none | {"protocol": "label-free", "metric": "feature_std", "value": 0.2, "params": {"images": 48}},
        )
    built = page("runs")
    check(built)
    table = built[built.index("Mean over seeds</h3>") :]
    first = text(table[: table.index("</table>")])
    places = [first.index(w) for w in ("linear-cached top1, all labels", "knn, k 5", "knn, k 48", "5 labels a class")]
    assert places == sorted(places)
    assert "map@100" not in first
    assert table.index("<details>") < table.index("map@100")
    output = text(built)
    assert "feature spread: std × √D, as in the curves 0.8" in output  # 0.2 × √16
    assert "near 1: evenly spread; 0: collapsed" in output


def test_means_carry_students_interval(page, sweep):
    values = [results(sweep / f"dcl-{s}", "trained", "knn")["value"] for s in SEEDS]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert f"{100 * low:.1f}–{100 * high:.1f} %" in text(page(sweep))


# --- Commands ---


def commands_of(page: str) -> list[str]:
    return [html.unescape(c) for c in re.findall(r"<pre tabindex=\"0\">(.*?)</pre>", page, re.DOTALL)]


def accepted(cli, command: str) -> None:
    """A shell reads the command, and sslctl plans it."""
    place, _, words = command.partition(" && ")
    assert place.startswith("cd "), command
    verb, *words = shlex.split(words)[1:]
    last = ["plan_only=true"] if verb == "pretrain" else ["--cfg", "job"]
    result = cli(verb, *words, *last)
    assert result.status == 0, (command, result.err)


@pytest.mark.parametrize(
    "which", [pytest.param("", id="sweep", marks=pytest.mark.slow), pytest.param("simclr-0", id="run")]
)
def test_every_command_of_the_page_is_accepted(page, cli, sweep, workdir, which):
    run = sweep / "simclr-0"
    shutil.copytree(sweep, workdir / "runs")
    words = ("subjects=[trained]", "device=cpu", "cache=false", "probe.epochs=1", "probe.lr=[0.1]", "labels=5")
    assert cli("linear-eval", workdir / "runs" / "simclr-0", *words, "draws=2", "seed=4").status == 0
    actual = commands_of(page(f"runs/{which}"))
    assert len(actual) >= (5 if which else 15)
    for command in actual:
        assert "…" not in command
        assert " # " not in command
        accepted(cli, command)
    (few,) = [c for c in actual if "labels=5" in c and "seed=4" in c]
    assert {"draws=2", "probe.lr=[0.1]", "probe.epochs=1"} <= set(shlex.split(few))
    assert str(workdir / "runs" / "simclr-0") in shlex.split(few)
    assert run.exists()


def test_closing_results_are_measured_again_by_all_their_settings(page, sweep, cli, workdir):
    shutil.copytree(sweep / "simclr-0", workdir / "copy")
    (command,) = [c for c in commands_of(page("copy")) if "linear-eval" in c and "probe.lr" in c]
    words = shlex.split(command)
    assert {"labels=all", "probe.epochs=2", "probe.batch_size=1024", "probe.validation=0.1"} <= set(words)
    before = results(workdir / "copy", "trained", "linear-cached")
    assert cli("linear-eval", *words[words.index("linear-eval") + 1 :], "device=cpu", "out=again.jsonl").status == 0
    records = [json.loads(line) for line in (workdir / "again.jsonl").read_text().splitlines()]
    (again,) = [r for r in records if r["subject"] == "trained" and r["metric"] == "top1"]
    assert (again["value"], again["params"]) == (before["value"], before["params"])


def test_more_seeds_of_every_setting_with_its_own_words(page, cli, sweep, monkeypatch):
    monkeypatch.setattr(recorded, "findings", lambda run: [health.Finding("ok", "healthy", "healthy")])  # long enough
    actual = [c for c in commands_of(page(sweep)) if " -m " in c]
    methods = [[w for w in shlex.split(c) if w.startswith("method=")][-1] for c in actual]
    assert methods == ["method=dcl", "method=simclr"]
    for command in actual:
        words = shlex.split(command)
        assert {"seed=2", "trainer.epochs=3", "probe.epochs=2"} <= set(words)
        (place,) = [w for w in words if w.startswith("run_dir=")]
        assert place.endswith("-s${seed}")
        assert f"'{place}'" in command  # no quotes within quotes
    accepted(cli, actual[0])


def test_seeds_in_sslctls_own_directories_are_named_together(sweep):
    run = recorded.read_run(sweep / "dcl-1", checkpoint.newest_valid(sweep / "dcl-1"), "dcl-1")
    run.environment["command"] = "sslctl pretrain method=dcl seed=1 trainer.epochs=3"
    words = shlex.split(commands.more_seeds([run]))
    assert words[-5:] == ["pretrain", "-m", "method=dcl", "trainer.epochs=3", "seed=0,1,2"]


# --- Too early to tell ---


@pytest.fixture
def undecided(monkeypatch):
    """Health's verdict on every run."""
    actual = [health.Finding("early", "early", "too early to tell: 9 steps, 100 are needed")]
    monkeypatch.setattr(recorded, "findings", lambda run: actual)


def test_a_run_too_short_to_be_judged_is_not_called_well(page, sweep, cli, undecided):
    built = page(sweep / "simclr-0")
    output = text(built)
    assert 'class="verdict early"' in built
    assert "badge ok" not in built
    assert "… too early" in output
    assert "No warnings" not in output
    assert "Too early to tell: too early" not in output
    assert "Train longer" in output
    assert "Take the weights away" not in output
    (command,) = [c for c in commands_of(built) if "trainer.epochs=167" in c]  # 500 steps of three an epoch
    assert "run_dir=" not in command
    accepted(cli, command)


def test_a_sweep_too_short_to_be_judged_is_not_called_well(page, sweep, undecided):
    built = page(sweep)
    assert 'class="verdict early"' in built
    assert "badge ok" not in built
    assert "Too early to tell of 4 of 4 runs" in text(built)
    assert "dcl: train longer" in text(built)


# --- Features ---


def test_a_report_after_an_evaluation_extracts_nothing(cli, sweep, workdir, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("extracted again")

    words = (str(sweep / "simclr-0"), *FAST[:-1], "out=page.html")
    assert cli("knn-eval", str(sweep / "simclr-0"), "subjects=[trained]", "out=results.jsonl", "device=cpu").status == 0
    monkeypatch.setattr("sslctl.evaluation.task.extract", refuse)
    result = cli("report", *words)
    assert result.status == 0, result.err
    assert cli("report", *words, "cache=false").status == 1  # so that the test can fail


def test_few_rows_of_a_large_dataset_are_extracted(cli, sweep, workdir, monkeypatch):
    from sslctl.evaluation import task as protocols

    real, sizes = protocols.extract, []
    monkeypatch.setattr(
        protocols, "extract", lambda f, source, rows, **k: sizes.append(len(rows)) or real(f, source, rows, **k)
    )
    assert cli("report", str(sweep / "simclr-0"), *FAST[1:], "map_images=10", "rows=20", "out=page.html").status == 0
    assert sizes
    assert max(sizes) == 20
    assert "20 test images of images against 20 training images" in text((workdir / "page.html").read_text())


# --- In a browser ---


@pytest.fixture(scope="module")
def pages(sweep, tmp_path_factory) -> dict[str, Path]:
    """The pages of one run and of the sweep."""
    folder = tmp_path_factory.mktemp("pages")
    for name, path in (("one", sweep / "simclr-0"), ("sweep", sweep)):
        assert main(["report", str(path), *FAST, f"out={folder / name}.html"]) == 0
    return {name: folder / f"{name}.html" for name in ("one", "sweep")}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (PHONE, True)], ids=["desktop", "phone-dark"])
def test_the_page_works_in_a_browser(pages, tmp_path, size, dark):
    needs_chromium()
    with browser(size, tmp_path, dark) as open_page:
        for path in pages.values():
            open_page.open(path)
            width, window = open_page.run("return [document.documentElement.scrollWidth, innerWidth]")
            assert width <= window == size[0]
            whole = "[...document.querySelectorAll('#health .scroll')].every(box => box.scrollWidth <= box.clientWidth)"
            assert open_page.run(f"return {whole}")
            stays = "const box = document.querySelector('#results .scroll'); box.scrollLeft = 200;"
            head = "box.querySelector('tbody th').getBoundingClientRect().left - box.getBoundingClientRect().left"
            assert abs(open_page.run(f"{stays} return {head}")) < 1
            background = "return getComputedStyle(document.body).backgroundColor"
            before = open_page.run(background)
            assert (before == "rgb(255, 255, 255)") != dark
            open_page.click("#theme")
            assert (open_page.run(background) == "rgb(255, 255, 255)") == dark
            open_page.hover(".chart[data-chart=loss] svg", 0.98, 0.5)
            loss = data_of(path.read_text())["charts"]["loss"]["series"]
            tip = open_page.run("return document.querySelector('.chart[data-chart=loss] .tip').innerText")
            assert "epoch 3" in tip
            assert all(str(series["points"][-1][1]) in tip for series in loss)
            x, y = data_of(path.read_text())["maps"]["0"]["points"][5]
            open_page.hover(".map .field", x / 1000, y / 1000)
            tip = (
                "return [...document.querySelectorAll('.map .tip')].filter(t => !t.hidden).map(t => t.innerText).join()"
            )
            assert any(name in open_page.run(tip) for name in CLASSES)
            open_page.click(".map .kinds button")
            assert open_page.run("return document.querySelectorAll('.map .faded').length") >= 1
            open_page.click(".map .switch")
            assert open_page.run("return document.querySelectorAll('.map .thumbs .tile').length") > 3
            assert open_page.errors() == []
            asked = [address for address in open_page.requests() if not address.startswith(("data:", "chrome:"))]
            assert asked == [path.resolve().as_uri()]
        open_page.run(
            "const made = document.createElement('script'); made.textContent = 'nowhere()'; document.head.append(made)"
        )
        assert any("nowhere" in message for message in open_page.errors())  # so that the test can fail
