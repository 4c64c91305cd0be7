"""sslctl pictures: what a run's method makes of some images."""

from typing import Any

from sslctl.errors import InputError, say
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import as_in_run, open_run, resolve_runs, views_of
from sslctl.visuals.method_pictures import draw, sheet
from sslctl.visuals.sheets import save, writable


def pictures(config: Any) -> None:
    """Writes one picture a run: a row an image, a column what the method calls it."""
    if not config.ckpt:
        raise InputError("no run to show: sslctl pictures runs/latest")
    for run, path in resolve_runs(config.ckpt):
        out = writable(config.out or run / "pictures.png", "pictures")
        opened = open_run(run, path)
        source = build_source(as_in_run(opened.config.dataset, run), "train")
        views = views_of(opened.config, source, opened.method)
        columns = draw(opened.method, source, views, seed=config.seed, images=config.images)
        if not columns:
            raise InputError(f"{run}: method={opened.config.names.method} has no pictures to show")
        save(sheet(columns, words=not source.modality.visible), out)
        what = "images" if source.modality.visible else "texts"
        say(f"{out}: {len(next(iter(columns.values())))} {what} at step {opened.step:,}: {', '.join(columns)}")
