"""The page's curves and their colours."""

import re
from pathlib import Path

import pytest

from sslctl.report import charts as figures

# --- Colours ---


@pytest.mark.parametrize(("theme", "least"), [("light", 3), ("dark", 3)])
def test_the_colours_of_curves_stand_out_from_the_paper(theme, least):
    style = (Path(figures.__file__).parent / "style.css").read_text()
    block = re.search(rf"color-scheme: {theme};(.*?)}}", style, re.DOTALL)[1]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name in (f"c{i}" for i in range(8)):
        low, high = sorted(luminance(colours[key]) for key in (name, "paper"))
        assert (high + 0.05) / (low + 0.05) >= least, name


# --- Drawings ---


def test_a_curve_ends_at_the_frame_and_keeps_its_first_and_last_point():
    points = [(i / 10, 10.0 + i) for i in range(2001)]
    chart = figures.curves("loss", [("", 0, points)])
    drawn = chart.series[0].points
    assert len(drawn) <= figures.MOST_POINTS + 1
    assert (drawn[0], drawn[-1]) == ((0.0, 10.0), (200.0, 2010.0))
    assert chart.x == (0.0, 200.0)
    assert chart.y[0] <= 10
    assert chart.y[1] >= 2010
    assert chart.series[0].path.startswith(f"M{figures.LEFT} ")
    assert [words for _, words in chart.x_ticks] == ["0", "50", "100", "150", "200"]


def test_what_is_not_finite_is_left_out_of_a_curve():
    chart = figures.curves("loss", [("", 0, [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 1.0)])])
    assert chart.series[0].points == [(0, 1.0), (3, 1.0)]
    assert figures.curves("loss", [("", 0, [(0, float("nan"))])]) is None
