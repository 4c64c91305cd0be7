"""sslctl report: gathers what the page says, fills the template, and writes one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sslctl.config.command_line import shell_words
from sslctl.errors import say, shown
from sslctl.evaluation.runner import reader_of
from sslctl.report import charts as figures
from sslctl.report import details, setup, summary, tables
from sslctl.report import groups as compare
from sslctl.report import measurement as measured
from sslctl.report.adaptation import before_after
from sslctl.report.run import Run
from sslctl.runs import directory as rundir
from sslctl.runs.reading import run_word
from sslctl.training.plan import choose_device


def page(runs: list[Run], common: Path, config: Any, left_out: Sequence[str] = ()) -> str:
    """Returns the whole page as HTML. left_out: sentences on runs that are not on it."""
    groups, columns = compare.groups_of(runs), compare.columns_of(runs)
    parts = tables.parts_of(columns)
    one = runs[0] if len(runs) == 1 else None
    opening = (
        summary.summary_of_one(one, columns)
        if one
        else summary.summary_of_many(runs, groups, columns, _all_of(runs, common))
    )
    charts = charts_of(groups, one is not None)
    device = choose_device(config.device)
    read = reader_of(config)
    data, group_details, sheets, map_names = details.data_of(runs[0], config), [], [], []
    if isinstance(data, str):
        say(f"left out: features and pictures: {data}")
    else:
        say(*data.notes)
        for number, group in enumerate(groups[: config.detailed]):
            say(f"{group.name}: features and pictures of {group.runs[0].label}")
            group_details.append(details.detail_of(group, number, data, config, read, device))
        map_sheet, map_names = details.map_sheet(data, config)
        pictures = [part.sheet for d in group_details for part in (d.views, d.pictures, d.neighbours) if part]
        sheets = [s for s in (map_sheet, *pictures) if s]
    detail_by_number = {detail.number: detail for detail in group_details}
    script = {
        "charts": {chart.name: chart.data() for chart in charts},
        "box": [figures.LEFT, figures.RIGHT, figures.TOP, figures.BOTTOM, figures.WIDTH, figures.HEIGHT],
        "maps": {
            str(d.number): {"points": d.map.points, "labels": d.map.labels, "kinds": [k["name"] for k in d.map.kinds]}
            for d in group_details
            if d.map
        },
        "names": map_names,
        "sheet": next(({"columns": s.columns, "rows": s.rows} for s in sheets if s.name == "map"), None),
    }
    return (
        environment()
        .get_template("template.html")
        .render(
            title=summary.title_of(runs, common),
            made=rundir.now(),
            versions=rundir.versions(),
            summary=opening,
            one=one,
            runs=runs,
            groups=groups,
            results=tables.results_of(one) if one else None,
            adaptation=before_after(one) if one else None,
            has_results=bool(one.results if one else columns),
            parts=parts,
            means=[] if one else [tables.means_of(groups, runs, part) for part in parts],
            speeds=[tables.speed_of(group) for group in groups],
            label_free=tables.label_free_of(groups),
            differences=compare.difference_rows(groups),
            setups=[
                (group, setup.lines_of(group.runs[0], data, detail_by_number.get(group.number))) for group in groups
            ],
            charts=charts,
            details=group_details,
            left_out=[group.name for group in groups[config.detailed :]],
            data=None if isinstance(data, str) else data,
            notes=[
                *(f"left out: {sentence}" for sentence in left_out),
                *([data] if isinstance(data, str) else data.notes),
            ],
            sheets=sheets,
            repeat=setup.repeat_rows(runs, groups),
            script=script,
            measured=measured,
            figures=figures,
        )
    )


def environment() -> Environment:
    """Returns what fills the pages' templates; texts in them are no markup."""
    return Environment(
        loader=PackageLoader("sslctl.report", "."),
        autoescape=True,
        finalize=_without_control_characters,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _without_control_characters(value: Any) -> Any:
    """Shows a text's control characters; autoescape, after this, keeps the text from being markup."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _all_of(runs: list[Run], common: Path) -> str:
    """Returns the words that name these runs and no others on a command line."""
    paths = [run.path for run in runs]
    return shell_words(map(run_word, [common] if rundir.find_runs(common) == sorted(paths) else paths))


def charts_of(groups: list[compare.Group], alone: bool) -> list[figures.Chart]:
    """Returns the curves of everything that was logged: the telling ones first."""
    runs = [(run, group) for group in groups for run in group.runs]
    logged = dict.fromkeys(name for run, _ in runs for record in run.metrics for name in record)
    names = [n for n in figures.MAIN if n in logged]
    names += [n for n in logged if n not in (*names, "step", "epoch") and not n.startswith("time_")]
    lines = {
        name: [
            ("" if alone else f"{group.name}, seed {run.config['seed']}", group.number, run.series(name))
            for run, group in runs
        ]
        for name in names
    }
    return [chart for name in names if (chart := figures.curves(name, lines[name]))]
