"""sslctl report: one HTML page over runs."""

import os
from pathlib import Path
from typing import Any

from sslctl.errors import InputError, say, user_path
from sslctl.factory.from_run import resolve_runs
from sslctl.report import groups as compare
from sslctl.report.page import page
from sslctl.report.run import read_run
from sslctl.runs.atomic import refuse_others_file, why_unwritable, write_text


def report(config: Any) -> None:
    """Writes the page and says where it is."""
    if not config.ckpt:
        raise InputError("no run to report on: sslctl report runs/latest")
    left_out: list[str] = []
    checkpoints = dict(resolve_runs(config.ckpt, left_out))
    common = Path(os.path.commonpath([run if len(checkpoints) == 1 else run.parent for run in checkpoints]))
    out = writable(user_path(config.out) if config.out else common / "report.html")
    runs = [read_run(run, path, _label(run, common, len(checkpoints))) for run, path in checkpoints.items()]
    compare.refuse_other_datasets(runs)
    text = page(runs, common, config, left_out)
    write_text(out, text)
    say(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(text.encode()) / 2**20:.1f} MiB in one file")


def _label(run: Path, common: Path, count: int) -> str:
    return run.name if count == 1 else str(run.relative_to(common))


def writable(out: Path) -> Path:
    """Returns where the page is to go. Raises InputError for a name that is none of a page, or a place that cannot be written."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"out={out}: expected an .html file")
    if out.is_dir():
        raise InputError(f"out={out} is a directory: name a file in it")
    refuse_others_file(out, "report", _is_page)
    if reason := why_unwritable(out.parent):
        raise InputError(f"out={out} cannot be written: {reason}; name another place with out=")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _is_page(path: Path) -> bool:
    with path.open("rb") as opened:
        return b"sslctl report</title>" in opened.read(4096)
