"""What was run, in words: the plan of a run, and the commands that repeat it."""

from typing import Any

from sslctl.config.literal import as_config
from sslctl.errors import InputError
from sslctl.report.commands import measuring, repeat_with
from sslctl.report.details import Detail
from sslctl.report.groups import Group
from sslctl.report.run import Run
from sslctl.training.plan import make_plan


def lines_of(run: Run, data: Any, detail: Detail | None = None) -> list[tuple[str, str]]:
    """Returns (subject, words) of what a run was.

    data: its images, or why they cannot be read. detail: what the page shows of it.
    """
    config, facts, environment = run.config, run.facts, run.environment
    trainer = config["trainer"]
    lines = [("dataset", f"{run.dataset}: {facts['num_images']:,} to train on")]
    if facts.get("num_classes"):
        lines.append(("labels", f"{facts['num_classes']} classes"))
    lines += [
        ("method", f"{run.names['method']}{_own(config['method'])}"),
        ("backbone", f"{run.names['backbone']}{_own(config['backbone'])}"),
        ("steps", _steps(run)),
    ]
    if features := _features(run, detail):
        lines.append(("features", features))
    lines += _planned(run, data)
    lines += [
        ("optimizer", _own(config["optimizer"]).strip(" ()")),
        ("batch", f"{trainer['batch_size']} images, {trainer['precision']}"),
        ("seed", str(config["seed"])),
        ("started", f"{environment['started']} on {environment['host']} ({environment['platform']})"),
    ]
    if time := run.training_time():
        lines.append(("time", f"{time} in training steps, by the logged speed"))
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())))
    lines += [("went on", _went_on(segment)) for segment in environment.get("segments", [])]
    lines += [("content", f"{name} {digest}") for name, digest in environment.get("hashes", {}).items()]
    return lines


def _went_on(segment: dict) -> str:
    """Returns 'from step 120 on other images (2 added) under torch 2.10.0, …'."""
    images = f" on other images ({segment['data']['changes']}): not exact any more" if "data" in segment else ""
    versions = ", ".join(f"{name} {version}" for name, version in segment["versions"].items())
    return f"from step {segment['step']:,}{images} under {versions}"


def _features(run: Run, detail: Detail | None) -> str:
    """Returns 'results are of mean; neighbours and map of cls; the method offers cls, mean'. '' where nothing was measured."""
    measured = dict.fromkeys(result.features for result in run.latest("trained").values())
    parts = [f"results are of {', '.join(measured)}"] if measured else []
    if detail and list(measured) != [detail.features]:
        parts.append(f"neighbours and map are of {detail.features}")
    if detail and len(detail.feature_names) > 1:
        parts.append(f"the method offers {', '.join(detail.feature_names)}")
    return "; ".join(parts)


def _own(node: dict) -> str:
    """Returns ' (key value, …)' of the plain values of a part of the configuration."""
    plain = {k: v for k, v in node.items() if k != "_target_" and v is not None and not isinstance(v, dict)}
    return f" ({', '.join(f'{k}={v}' for k, v in plain.items())})" if plain else ""


def _steps(run: Run) -> str:
    facts = run.facts
    per, total = facts["steps_per_epoch"], facts["total_steps"]
    done = "" if run.finished else f"; {run.step:,} done"
    return f"{total:,} = {total / per:g} epochs × {per} steps of {facts['batch_size']} images{done}"


def _planned(run: Run, data: Any) -> list[tuple[str, str]]:
    """Returns what the plan says of learning rate and augmentation; the base rate alone where the images are gone."""
    settings = as_config(run.config)
    settings.trainer.device = "cpu"  # the run's own may not be here, and none of these lines says it
    if isinstance(data, str):
        return [("lr", f"base_lr {run.config['optimizer']['base_lr']:g} per 256 images")]
    try:
        plan = make_plan(settings, data.trained)
    except InputError as error:  # the images have changed: fewer than a batch
        return [("lr", f"base_lr {run.config['optimizer']['base_lr']:g} per 256 images; {error}")]
    return [
        ("lr", f"{plan.lr_words}; {plan.schedule.shape}, warm-up {plan.schedule.warmup_steps} steps"),
        ("augmentation", f"dropped for this dataset: {', '.join(plan.dropped) or 'no operation'}"),
    ]


def repeat_rows(runs: list[Run], groups: list[Group]) -> list[dict]:
    """Returns for every run how to train it again, and how to measure each of its results again."""
    names = {run.path: group.name for group in groups for run in group.runs}
    rows = []
    for run in runs:
        measured = dict.fromkeys(measuring(run, result) for result in run.latest("trained").values())
        rows.append({"run": run, "group": names[run.path], "train": repeat_with(run), "measure": list(measured)})
    return rows
