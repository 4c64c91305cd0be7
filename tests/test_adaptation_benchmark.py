"""scripts/adaptation_benchmark.py: its domain of small marks, its rows' commands, and the table that is made of rows."""

from pathlib import Path

import numpy as np
import pytest
from adaptation_benchmark import AUTOMATIC, Row, best_two, markdown
from adaptation_benchmark_data import LARGEST, MARKS, SIDE, SMALLEST, marked, texture, write_marks, write_neu_det
from PIL import Image

from sslctl.cli import main

# --- Images with marks ---


def test_the_domain_of_marks_is_the_same_each_time(tmp_path):
    counts = {"train": 2, "test": 1}
    first, second = (write_marks(tmp_path / name, counts) for name in "ab")
    files = sorted(first.rglob("*.png"))
    assert [(second / file.relative_to(first)).read_bytes() for file in files] == [file.read_bytes() for file in files]
    assert len(files) == 3 * len(MARKS)
    assert len({file.read_bytes() for file in files}) == len(files)  # no image lies in both splits


def test_the_mark_alone_decides_the_class():
    """Of one seed images differ inside of the mark's square, and nowhere else; there every two marks do."""
    for seed in range(20):
        plain, (top, left, size) = marked("none", seed)
        assert SMALLEST <= size <= LARGEST
        square = np.zeros((SIDE, SIDE), bool)
        square[top : top + size, left : left + size] = True
        seen = {mark: marked(mark, seed)[0].astype(int) for mark in MARKS}
        for mark in MARKS:
            assert (seen[mark] == plain)[~square].all()
        for one, other in ((one, other) for one in MARKS for other in MARKS if one < other):
            assert (np.abs(seen[one] - seen[other])[square] > 20).sum() >= 3, (seed, one, other)
    assert (marked("none", 0)[0] != marked("none", 1)[0]).any()


def test_amplitudes_of_a_texture_fall_as_one_over_the_frequency():
    power = np.mean([np.abs(np.fft.rfft2(texture(np.random.default_rng(s)) - 0.5)) ** 2 for s in range(40)], axis=0)
    frequencies = np.array([4, 8, 16])
    slope = np.polyfit(np.log(frequencies), np.log(power[0, frequencies]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.3)  # of the power


def test_numbers_of_neu_det_decide_the_split(tmp_path):
    (tmp_path / "images").mkdir()
    for number in (1, 240, 241, 300):
        Image.new("L", (4, 4)).save(tmp_path / "images" / f"rolled-in_scale_{number}.jpg")
    root = write_neu_det(tmp_path, tmp_path / "split")
    assert [path.stem for path in sorted((root / "train").iterdir())] == ["rolled-in_scale_1", "rolled-in_scale_240"]
    assert [path.stem for path in sorted((root / "test").iterdir())] == ["rolled-in_scale_241", "rolled-in_scale_300"]


# --- Rows ---


@pytest.mark.parametrize(
    ("domain", "recipe", "weights"),
    [("neu-det", "diet", "w.pt"), ("neu-det", AUTOMATIC, "w.pt"), ("cifar10", "weak_crops", None)],
)
def test_a_row_is_a_command(domain, recipe, weights, tmp_path, capsys):
    row = Row(domain, recipe, 1, Path(weights) if weights else None, tmp_path, threads=3)
    assert main([*row.words(), "--cfg", "job"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "seed: 1\n" in said
    assert "threads: 3\n" in said
    assert (f"weights: {weights or 'null'}\n") in said
    if recipe == AUTOMATIC:
        assert not {"recipes", "dataset.image_size", "trainer.epochs"} & {w.partition("=")[0] for w in row.words()}


def record(name, subject, seed, few, knn=50.0, verdict=None):
    values = {"kNN": 60.0, "linear": 70.0, "5 labels a class": few, "online kNN": knn}
    own = {"verdict": verdict, "minutes": 2.0} if verdict else {}
    return {"table": "neu-det", "name": name, "subject": subject, "seed": seed} | values | own


ROWS = [
    record("diet", "given", 0, 30.0),
    record("diet", "trained", 0, 40.0, 80.0, "better"),
    record("simclr", "given", 0, 30.0),
    record("simclr", "given", 1, 32.0),
    record("simclr", "trained", 0, 41.0, 90.0, "better"),
    record("simclr", "trained", 1, 43.0, 70.0, "mixed"),
    record("weak_crops", "trained", 0, 99.0, 60.0, "better"),
    {"table": "neu-det", "name": "diet, from scratch", "subject": "scratch", "seed": 0, "kNN": 20.0},
]


def test_the_table_is_made_of_the_rows():
    lines = markdown(ROWS).splitlines()
    assert lines[0] == "| weights | kNN | linear | 5 labels a class | online kNN | minutes | verdict |"
    assert lines[2] == (
        "| as they are (2 seeds) | 60.00 ± 0.00 | 70.00 ± 0.00 | 31.00 ± 1.41 | 50.00 ± 0.00 |  |  |"
    )  # a seed counts once, whichever recipes have measured it
    assert lines[3] == "| `diet` | 60.00 | 70.00 | 40.00 | 80.00 | 2.0 | better 1× |"
    assert lines[4].startswith("| `simclr` (2 seeds) | 60.00 ± 0.00 | 70.00 ± 0.00 | 42.00 ± 1.41 | 80.00 ± 14.14 |")
    assert lines[4].endswith("| 2.0 | better 1×, mixed 1× |")
    assert lines[6] == "| `diet, from scratch` | 20.00 |  |  |  |  |  |"
    assert len(lines) == 7


def test_the_best_recipes_are_those_of_the_best_online_knn():
    assert best_two(ROWS) in (["diet", "simclr"], ["simclr", "diet"])
    assert best_two([]) == []
