"""sslctl pretrain: compose → check → plan → lock → resume or start → fit → evaluate."""

import contextlib
import functools
import json
import sys
from datetime import timedelta
from typing import Any

from omegaconf import OmegaConf

from sslctl import distributed
from sslctl.config.command_line import command_line
from sslctl.config.literal import escaped
from sslctl.data.files import ImageError
from sslctl.data.overlap import doubts
from sslctl.data.sources import Source
from sslctl.errors import InputError, Stopped, say, user_path
from sslctl.evaluation.closing import finish, is_finished
from sslctl.evaluation.online import Embedder, Online, class_facts
from sslctl.evaluation.runner import judged_images, labelled_sources
from sslctl.factory.expectation import has_weights
from sslctl.factory.from_config import refuse_size
from sslctl.factory.from_run import with_preprocess
from sslctl.methods.base import Method
from sslctl.models.preprocess import Preprocess
from sslctl.runs import directory as rundir
from sslctl.runs.atomic import write_text
from sslctl.runs.checkpoint import newest_valid
from sslctl.runs.claim import claim, refuse_unwritable
from sslctl.runs.description import with_absolute_roots
from sslctl.runs.file_list import mark_unreadable
from sslctl.runs.health import UNHEALTHY, Unhealthy, Watch
from sslctl.runs.ownership import refuse_other
from sslctl.signals import TO_BE_CONTINUED, Interrupted, Signals
from sslctl.training.adapting import adaptation_lines
from sslctl.training.beginning import begin
from sslctl.training.dry_run import time_steps
from sslctl.training.launch import launch
from sslctl.training.logger import Log
from sslctl.training.plan import Run, choose_device, print_plan
from sslctl.training.precision import NonFiniteError
from sslctl.training.requeue import requeue
from sslctl.training.saved_state import take_over_optimizer_state
from sslctl.training.setup import Setup, set_up
from sslctl.training.train import Outcome, fit
from sslctl.visuals.tensorboard import Board


def pretrain(config: Any, command: str | None = None) -> None:
    """Trains, or continues, or finishes the evaluation of the run that this configuration names.

    command: what the user typed, where Hydra does not know it: in a process of trainer.processes.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    command = command or command_line()
    processes = config.trainer.processes

    # trainer.processes=N: this process only starts and watches the others.
    if processes > 1 and not distributed.is_distributed():
        status = launch(resolved, command, processes)
        if status:
            raise Stopped(status)
        return

    # One of several processes, by us or by torchrun, whose number is not in the configuration; or the only one.
    patience = timedelta(minutes=config.trainer.timeout_minutes)
    try:
        distributed.join(choose_device(config.trainer.device).type, patience)
        if processes not in (1, distributed.world_size()):
            raise InputError(
                f"trainer.processes={processes} in a group of {distributed.world_size()}: leave it to torchrun"
            )
        parts = distributed.world_size() * config.trainer.accumulate_steps
        if config.trainer.batch_size % parts:
            raise InputError(f"trainer.batch_size={config.trainer.batch_size} does not divide into {parts} parts")
        _pretrain(config, with_absolute_roots(resolved), command)
        distributed.leave()
    except distributed.OtherProcessFailed:
        raise
    except Exception as error:  # whatever it is: the other processes are told whose it is, and it goes on up
        distributed.record_first_failure()
        explained = distributed.explain(error)
        if explained is not error:
            raise explained from error
        raise


def _pretrain(config: Any, resolved: dict, command: str) -> None:
    """Does `pretrain` in one of the run's processes."""
    # What is trained, on which images, from which weights, and in which directory: see sslctl/training/beginning.py.
    if not config.plan_only:
        refuse_unwritable(user_path(config.run_dir or "runs"))
    if config.run_dir:
        refuse_other(user_path(config.run_dir))
    beginning = begin(config, resolved)
    run, preprocess, workers = beginning.run, beginning.images.preprocess, config.trainer.workers

    # What watches the training: the online evaluation with its pictures, and the verdict on the run's health.
    judges = labelled_judges(config, run.source, preprocess, command.split())
    measure, board = online_evaluation(config, run, preprocess, judges)
    setup = set_up(
        config,
        run,
        embed=Embedder(run.method, run.source, preprocess, run.plan, workers),
        online=functools.partial(evaluate_online, measure, board),
        watch=None if distributed.rank() else Watch(run.run_dir, config.trainer.on_collapse),
    )
    if beginning.continued and config.continue_optimizer:
        take_over_optimizer_state(setup.optimizer, beginning.continued.optimizer_state())
    if distributed.rank() == 0:
        warnings = doubts(run.source, judges[1] if judges else None)
        adaptation = adaptation_lines(config, run)
        print_plan(config, run, warnings, beginning.notes, beginning.images.normalization, adaptation)
    if config.plan_only:
        time_steps(setup, measure)
        return

    # From here on files are written, by the main process. Its lock lasts until the run has ended.
    if config.trainer.resume == "must" and newest_valid(run.run_dir) is None:
        raise InputError(f"trainer.resume=must: {run.run_dir} has no valid checkpoint")
    test = judges[1] if judges and config.evaluation.closing else None
    with contextlib.ExitStack() as stack:

        def claim_run() -> bool:
            """Takes the run directory; returns whether the run in it is finished."""
            lock, setup.description = claim(
                run.run_dir,
                config=resolved,
                hashes=beginning.networks.hashes,
                facts=vars(run.method.facts),
                preprocess=vars(preprocess),
                command=command,
                health_facts=health_facts(run.method, measure.source),
                files=run.source.file_list,
            )
            stack.callback(lock.release)
            beginning.save_given(config.backbone)
            described = {"format": 1, "train": run.source.as_json()} | ({"test": judges[1].as_json()} if judges else {})
            rundir.write_if_other(run.run_dir / rundir.DATA, json.dumps(described, indent=1) + "\n")
            finished = is_finished(run.run_dir, run.plan, test)
            if finished:
                newest_valid(run.run_dir)  # a checkpoint that was damaged since is named, with a warning
            return finished

        if distributed.on_main_process(claim_run):
            say(f"already finished: {run.run_dir}")
            return

        # Train, then evaluate; a signal during either leaves what the same command goes on from.
        with Signals(config.trainer.requeue_signal) as signals:
            distributed.record_listening()
            complete = train(setup, signals) is Outcome.FINISHED
            complete = complete and distributed.on_main_process(lambda: close(config, setup, preprocess, judges))
            status = distributed.all_reduce_max(signals.status)  # it may have reached another process
            if not complete:
                if distributed.rank() == 0:
                    say(f"stopped; the same command continues {run.run_dir}", file=sys.stderr)
                    if status == TO_BE_CONTINUED:
                        requeue()
                raise Stopped(status)


# --- What watches the training ---


def labelled_judges(
    config: Any, source: Source, preprocess: Preprocess, words: list[str]
) -> tuple[Source, Source] | None:
    """Returns the labelled (train, test) that the run is judged on: eval_dataset, else the dataset itself, else None.

    words: of the command, which decide what is read as the run reads its own images.
    """
    if config.eval_dataset is not None:
        node = config.eval_dataset
        if source.tokenizer and "tokenizer" in node and not node.tokenizer:
            node = OmegaConf.merge(node, {"tokenizer": escaped(source.tokenizer)})
        train, test = labelled_sources(with_preprocess(node, preprocess, "eval_dataset", words))
        preprocess.refuse_other("this run", train, "eval_dataset", judges=True)
        return train, test
    train, test = judged_images(source, with_preprocess(config.dataset, preprocess, words=words))
    return None if test is None else (train, test)


def online_evaluation(
    config: Any, run: Run, preprocess: Preprocess, judges: tuple[Source, Source] | None
) -> tuple[Online, Board]:
    """Returns what measures the features in training and what pictures them: on the labelled images, or on those trained on."""
    source, judged = judges[0] if judges else run.source, preprocess
    if source.image_size != run.source.image_size:
        refuse_size(run.method.backbone, source.image_size, "eval_dataset")
        judged = preprocess.at(source.image_size)
    workers = config.trainer.workers
    measure = Online(config.evaluation.knn, source, judged, run.plan, workers)
    followed = has_weights(config.backbone) and run.plan.knn_every_steps and not config.plan_only
    if followed and config.continue_run is None and distributed.rank() == 0:
        measure = measure.with_given(run.method)
    return measure, Board(run.source, source, run.views, judged, config.seed, run.plan, workers)


def health_facts(method: Method, judged: Source) -> dict[str, Any]:
    """Returns fields of RunFacts, by which the verdict on a run is reached. judged: the images of its online evaluation."""
    loss, feature_dim = method.uninformative_loss(), method.backbone.embed_dim
    return {"uninformative_loss": loss, "feature_dim": feature_dim, **class_facts(judged)}


# --- Training ---


def evaluate_online(measure: Online, board: Board, method: Method, log: Log, step: int) -> None:
    """Logs the online evaluation of a step: figures, and pictures where TensorBoard is kept."""
    figures, embedded = measure(method)
    if log.writer:
        with log.naming():
            board(log.writer, method, step, embedded)
    log.record(step, figures)  # last: what a signal cuts short before is done again


def train(setup: Setup, signals: Signals) -> Outcome:
    """Calls fit(), and leaves in the run directory why training stopped where that was no signal. Raises Unhealthy."""
    note, first = setup.run_dir / rundir.STOPPED, distributed.rank() == 0
    if first:
        note.unlink(missing_ok=True)
    try:
        outcome = fit(setup, signals)
    except ImageError as error:
        mark_unreadable(setup.run_dir, str(error))
        raise
    except NonFiniteError as error:
        if first:
            write_text(note, json.dumps({"reason": str(error)}))
        raise
    if outcome is Outcome.UNHEALTHY:
        if not first:
            raise distributed.OtherProcessFailed(UNHEALTHY)
        raise Unhealthy(
            f"{setup.watch.reason}; saved in {setup.run_dir} (trainer.on_collapse=stop: the same command continues it"
            " with trainer.on_collapse=warn)"
        )
    return outcome


def close(config: Any, setup: Setup, preprocess: Preprocess, judges: tuple[Source, Source] | None) -> bool:
    """Calls finish(); returns False when a signal cut it short."""
    try:
        finish(config, setup, preprocess, judges)
    except Interrupted:
        return False
    return True
