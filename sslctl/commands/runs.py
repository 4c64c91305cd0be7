"""sslctl runs: what is on disk."""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sslctl.config.command_line import recorded_words, shell_words
from sslctl.errors import InputError, say, shown, user_path
from sslctl.evaluation.console import console
from sslctl.runs import directory as rundir
from sslctl.runs.adaptation import Adaptation, read_adaptation
from sslctl.runs.checkpoint import step_of, steps_on_disk
from sslctl.runs.claim import Lock, is_held
from sslctl.runs.health import findings, verdict
from sslctl.runs.metrics import read_metrics
from sslctl.runs.ownership import is_checkpoint, refuse_other
from sslctl.runs.reading import read_environment, repair_command
from sslctl.runs.repair import damages, repair


def runs(config: Any) -> None:
    """Prints a table of the runs below a directory (runs/ unless named), and the command that continues each unfinished one.

    Damaged ones are listed with what is wrong, and repaired where that is asked for.
    """
    directories = config.ckpt if config.ckpt else ["runs"]
    roots = [user_path(w) for w in ([directories] if isinstance(directories, str) else directories)]
    for root in roots:
        if not root.is_dir():
            raise InputError(f"no runs: {root} is not a directory (sslctl runs DIR looks elsewhere)")
    run_dirs = list(dict.fromkeys(run for root in roots for run in rundir.find_runs(root)))
    if not run_dirs:
        say(f"no runs below {', '.join(map(str, roots))}")
        return
    if config.repair:
        _repair(run_dirs)
        return
    table, resumable, damaged = Table(), [], []
    for column in ("run", "status", "epoch", "kNN %", "verdict", "size"):
        table.add_column(column, justify="left" if column in ("run", "status", "verdict") else "right")
    for run in run_dirs:
        size = f"{rundir.total_size(run) / 2**20:,.1f} MiB"
        if wrong := damages(run):
            table.add_row(Text(shown(_relative(run))), "damaged", "", "", "", size)
            damaged += [f"  {shown(damage.describe())}" for damage in wrong]
            damaged += [f"  {repair_command(run)}"] if any(damage.repairable for damage in wrong) else []
            continue
        if unreadable := [path for path in steps_on_disk(run) if not is_checkpoint(path)]:
            damaged += [f"  {shown(_relative(path))}: its manifest cannot be read" for path in unreadable]
            damaged += [f"  {repair_command(run)}"]
        status, epoch, knn = _state(run)
        worst = verdict(findings(run))
        health = {"warn": f"{worst.rule} (warn)", "early": "too early"}.get(worst.level, worst.rule)
        table.add_row(Text(shown(_relative(run))), status, epoch, knn, health, size)
        if status != "finished":
            resumable.append(f"  {_command(run)}")
    console().print(table)
    if resumable:
        say("to continue:")
        say(*resumable)
    if damaged:
        say("damaged, with the commands that set aside what cannot be read:")
        say(*damaged)


def _repair(run_dirs: list[Path]) -> None:
    """Repairs runs and says what was done. One that is not sslctl's, cannot be written or is in use is refused."""
    for run in run_dirs:
        refuse_other(run)
        lock = Lock(run)
        try:
            sentences = repair(run)
        except OSError as error:
            raise InputError(f"{error.filename or run} cannot be written: {error.strerror}; repair a copy") from error
        finally:
            lock.release()
        for sentence in sentences or [f"{_relative(run)}: nothing to repair"]:
            say(sentence)


def _command(run: Path) -> str:
    """Returns the command that continues a run, in the directory where it was started."""
    environment, adaptation = read_environment(run), _adaptation(run)
    command = adaptation.command if adaptation else environment["command"]  # a run's own is that of pretrain
    try:
        return f"(cd {shell_words([environment['cwd']])} && {shell_words(recorded_words(command))})"
    except InputError as error:  # of one run; the others have theirs
        return f"none for {shown(_relative(run))}: {shown(error)}"


def _adaptation(run: Path) -> Adaptation | None:
    """Returns the adaptation that a run is part of; None of other runs, and where its record cannot be read."""
    try:
        return read_adaptation(run)
    except InputError:
        return None


def _state(run: Path) -> tuple[str, str, str]:
    """Returns (status, epoch of epochs, latest kNN) of a run."""
    facts, metrics, saved = (
        read_environment(run)["facts"],
        read_metrics(run),
        list(filter(is_checkpoint, steps_on_disk(run))),
    )
    step = step_of(saved[0]) if saved else 0
    epochs = facts["total_steps"] // facts["steps_per_epoch"]
    knn = [m["knn"] for m in metrics if "knn" in m]
    if is_held(run):
        status, step = "running", max([step, *(m["step"] for m in metrics)])
    elif (run / rundir.BACKBONE).exists():
        adaptation = _adaptation(run)
        status = "no verdict" if adaptation and not adaptation.verdict else "finished"
    else:
        status = "stopped" if saved else "no checkpoint"
    return status, f"{step / facts['steps_per_epoch']:.1f}/{epochs}", f"{100 * knn[-1]:.1f}" if knn else ""


def _relative(run: Path) -> str:
    return str(run.relative_to(Path.cwd())) if Path.cwd() in run.parents else str(run)
