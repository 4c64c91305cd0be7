"""sslctl pretrain: compose → check → plan → lock → resume or start → fit → evaluate."""

import contextlib
import functools
import json
import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from sslctl import distributed
from sslctl.config.command_line import command_line
from sslctl.config.literal import escaped
from sslctl.data.files import ImageError
from sslctl.data.layout import NoTestSplit
from sslctl.data.overlap import doubts
from sslctl.data.sources import Source
from sslctl.errors import InputError, Stopped, say, user_path
from sslctl.evaluation.closing import finish, is_finished
from sslctl.evaluation.online import Embedder, Online, class_facts
from sslctl.evaluation.runner import labelled_sources
from sslctl.factory.backbone_file import save_backbone
from sslctl.factory.continued import Beginning, same_run
from sslctl.factory.expectation import as_expected, has_weights
from sslctl.factory.from_config import (
    build_backbone,
    build_method,
    build_source,
    build_views,
    refuse_other_views,
    refuse_size,
    refuse_sizes,
)
from sslctl.factory.from_run import as_in_run, with_preprocess
from sslctl.factory.teacher import load_teacher, save_teacher
from sslctl.methods.base import Method
from sslctl.models.preprocess import Preprocess, preprocess_of
from sslctl.models.weights import weights_sha256
from sslctl.runs import directory as rundir
from sslctl.runs.atomic import write_text
from sslctl.runs.checkpoint import newest_valid
from sslctl.runs.claim import claim, refuse_unwritable
from sslctl.runs.continuing import find_run
from sslctl.runs.description import with_absolute_roots
from sslctl.runs.file_list import mark_unreadable
from sslctl.runs.health import UNHEALTHY, Unhealthy, Watch
from sslctl.runs.ownership import refuse_other, steps_on_disk
from sslctl.signals import TO_BE_CONTINUED, Interrupted, Signals
from sslctl.training.dry_run import time_steps
from sslctl.training.launch import launch
from sslctl.training.logger import Log
from sslctl.training.plan import choose_device, make_plan, print_plan
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


def _pretrain(
    config: Any, resolved: dict, command: str, as_before: tuple[Path, Source, Preprocess] | None = None
) -> None:
    """Does `pretrain` in one of the run's processes.

    as_before: the directory of a run that goes on although some of its files were repaired or removed, its images and what it
    makes of them.
    """
    # Data first: channels, image size and steps follow from it.
    if not config.plan_only:
        refuse_unwritable(user_path(config.run_dir or "runs"))
    if config.run_dir:
        refuse_other(user_path(config.run_dir))
    normalization = None
    beginning = Beginning.of(config.continue_run) if config.continue_run else None
    node = as_in_run(config.dataset, beginning.run) if beginning else config.dataset
    if as_before:
        run_dir, source, preprocess = as_before
    else:
        source = distributed.main_process_first(lambda: build_source(node, "train"))
        preprocess, normalization = as_expected(preprocess_of(node, source), config.backbone)
        if beginning:
            preprocess = beginning.normalized(preprocess)
    plan = make_plan(config, source)

    # Networks, each drawn from the seed; what they read from files decides the run as much as its configuration does.
    torch.set_num_threads(plan.threads)
    seed_generators(config.seed)
    backbone = distributed.main_process_first(lambda: build_backbone(config.backbone, preprocess))  # it may download
    hashes = {"data": source.content_hash}
    if has_weights(config.backbone):
        hashes["weights"] = weights_sha256(backbone)
    teacher = None
    if "teacher" in config.method:
        teacher = load_teacher(
            config.method.teacher,
            config.method.get("teacher_backbone"),
            preprocess,
            {name: config.method.get(f"teacher_{name}") for name in ("mean", "std")},
        )
        hashes["teacher"] = weights_sha256(teacher.network)
    facts = plan.facts(len(source.classes) if source.labelled else 0)
    method = build_method(config.method, backbone, facts, teacher)
    notes = []
    if beginning:
        notes.append(f"begins with {beginning.load(method)}")
        hashes["continued run"] = beginning.digest

    # The same run on other images, in its own directory or, by default, beside it: where it can, it goes on.
    if as_before is None:
        run_dir, candidates, more = distributed.on_main_process(lambda: find_run(config, resolved, hashes))
        notes += more
        if mine := distributed.main_process_first(lambda: same_run(candidates, node, source)):
            _pretrain(config, resolved, command, mine)
            return

    # Views, and whether data, views, method and networks fit one another.
    views = build_views(config, source, backbone.network)
    refuse_other_views(method, source, views, config.names)
    refuse_sizes(backbone, views, source.image_size)
    if teacher is not None:
        teacher.refuse_size(views.sizes()["global"][1], config.method.teacher)

    # What watches the training: the online evaluation with its pictures, and the verdict on the run's health.
    judges, judged = labelled_judges(config, source, preprocess, command.split()), preprocess
    if judges and judges[0].image_size != source.image_size:
        refuse_size(backbone, judges[0].image_size, "eval_dataset")
        judged = preprocess.at(judges[0].image_size)
    measure = Online(config.evaluation.knn, judges[0] if judges else source, judged, plan, config.trainer.workers)
    board = Board(source, measure.source, views, judged, config.seed, plan.total_steps, config.trainer.workers)
    setup = set_up(
        config,
        plan,
        method,
        source,
        views,
        run_dir,
        embed=Embedder(method, source, preprocess, plan, config.trainer.workers),
        online=functools.partial(evaluate_online, measure, board),
        watch=None if distributed.rank() else Watch(run_dir, config.trainer.on_collapse),
    )
    if beginning and config.continue_optimizer:
        take_over_optimizer_state(setup.optimizer, beginning.optimizer_state())
    if distributed.rank() == 0:
        warnings = doubts(source, judges[1] if judges else None)
        print_plan(config, plan, method, source, views, run_dir, warnings, notes, normalization)
    if config.plan_only:
        time_steps(setup, measure)
        return

    # From here on files are written, by the main process. Its lock lasts until the run has ended.
    if config.trainer.resume == "must" and newest_valid(run_dir) is None:
        raise InputError(f"trainer.resume=must: {run_dir} has no valid checkpoint")
    test = judges[1] if judges and config.evaluation.closing else None
    with contextlib.ExitStack() as stack:

        def claim_run() -> bool:
            """Takes the run directory; returns whether the run in it is finished."""
            health_facts = {
                "uninformative_loss": method.uninformative_loss(),
                "feature_dim": backbone.embed_dim,
                **class_facts(measure.source),
            }
            lock, setup.description = claim(
                run_dir,
                config=resolved,
                hashes=hashes,
                facts=vars(facts),
                preprocess=vars(preprocess),
                command=command,
                health_facts=health_facts,
                files=source.file_list,
            )
            stack.callback(lock.release)
            if teacher is not None:
                save_teacher(teacher, run_dir)
            given = run_dir / rundir.GIVEN
            begins = not steps_on_disk(run_dir) and not (run_dir / rundir.BACKBONE).exists()  # runs of 0.1 keep none
            if has_weights(config.backbone) and begins and not given.exists():
                save_backbone(given, backbone, OmegaConf.to_container(config.backbone, resolve=True), preprocess)
            described = {"format": 1, "train": source.as_json()} | ({"test": judges[1].as_json()} if judges else {})
            rundir.write_if_other(run_dir / rundir.DATA, json.dumps(described, indent=1) + "\n")
            if source.tokenizer:
                write_text(run_dir / rundir.TOKENIZER, source.tokenizer)
            return is_finished(run_dir, plan, test)

        if distributed.on_main_process(claim_run):
            say(f"already finished: {run_dir}")
            return

        # Train, then evaluate; a signal during either leaves what the same command goes on from.
        with Signals(config.trainer.requeue_signal) as signals:
            distributed.record_listening()
            complete = train(setup, signals) is Outcome.FINISHED
            complete = complete and distributed.on_main_process(lambda: close(config, setup, preprocess, judges))
            status = distributed.all_reduce_max(signals.status)  # it may have reached another process
            if not complete:
                if distributed.rank() == 0:
                    say(f"stopped; the same command continues {run_dir}", file=sys.stderr)
                    if status == TO_BE_CONTINUED:
                        requeue()
                raise Stopped(status)


# --- Before training ---


def seed_generators(seed: int) -> None:
    """Seeds every global generator: initial weights, dropout and whatever a user's method draws come from them."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


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
    train = source.labelled_part()
    if not train.labelled and not train.has_several:
        return None
    try:
        return train, build_source(with_preprocess(config.dataset, preprocess, words=words), "test").labelled_part()
    except NoTestSplit as error:  # which training does not need
        say(f"not judged: {error}")
        return None


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
