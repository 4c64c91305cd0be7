"""sslctl pretrain: compose → check → plan → lock → resume or start → fit → evaluate."""

import contextlib
import itertools
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from sslctl import distributed
from sslctl import run_directory as rundir
from sslctl.backbones import describe
from sslctl.build import (
    Preprocess,
    build_backbone,
    build_method,
    build_source,
    build_views,
    preprocess_of,
    refuse_sizes,
)
from sslctl.checkpoint import newest_valid, save_tensors
from sslctl.cli import Stopped
from sslctl.clock import words
from sslctl.config import InputError, user_path
from sslctl.data.sources import Source
from sslctl.evaluation.online import closing_records, online_knn
from sslctl.evaluation.results import append, show
from sslctl.evaluation.verbs import labelled_sources, refuse_other_images
from sslctl.launch import launch
from sslctl.logs import duration
from sslctl.methods.base import Method
from sslctl.overrides import command_line
from sslctl.plan import Plan, choose_device, make_plan
from sslctl.run_directory import decisive, fingerprint
from sslctl.signals import Interrupted, Signals
from sslctl.train import Setup, fit, set_up, told_of_memory, train_step
from sslctl.weights import weights_sha256


def pretrain(config: Any, command: str | None = None) -> None:
    """Trains, or continues, or finishes the evaluation of the run that this configuration names.

    command: what the user typed, where Hydra does not know it: in a process of trainer.processes.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    command = command or command_line()
    processes = config.trainer.processes
    if processes > 1 and not distributed.launched():
        status = launch(resolved, command, processes)
        if status:
            raise Stopped(status)
        return
    distributed.join(choose_device(config.trainer.device).type)
    try:
        if processes not in (1, distributed.world()):
            raise InputError(f"trainer.processes={processes} in a group of {distributed.world()}: leave it to torchrun")
        parts = distributed.world() * config.trainer.accumulate_steps
        if config.trainer.batch_size % parts:  # torchrun's number is not in the configuration
            raise InputError(f"trainer.batch_size={config.trainer.batch_size} does not divide into {parts} parts")
        _pretrain(config, resolved, command)
        distributed.leave()
    except distributed.Elsewhere:
        raise
    except Exception:
        distributed.blame()
        raise


def _pretrain(config: Any, resolved: dict, command: str) -> None:
    """`pretrain` in one of the run's processes."""
    if not config.plan_only:
        rundir.refuse_unwritable(user_path(config.run_dir or "runs"))
    source = distributed.first_first(lambda: build_source(config.dataset, "train"))
    preprocess = preprocess_of(config.dataset, source)
    plan = make_plan(config, source)
    torch.set_num_threads(plan.threads)
    seed_generators(config.seed)
    backbone = build_backbone(config.backbone, preprocess)
    hashes = {"data": source.content_hash} | (
        {"weights": weights_sha256(backbone)} if config.backbone.get("weights") else {}
    )
    facts = plan.facts(len(source.classes))
    method = build_method(config.method, backbone, facts)
    views = build_views(config, source.image_size, plan.dropped)
    refuse_sizes(backbone, views, source.image_size)
    probed = _probed(config, source, preprocess)
    run_dir = run_directory_of(config, resolved, hashes)
    knn = online_knn(config.evaluation.knn, probed[0], preprocess, plan, config.trainer.workers) if probed else None
    setup = set_up(config, plan, method, source, views, run_dir, knn)
    describe_run(config, plan, method, preprocess, views.sizes(), run_dir)
    if config.plan_only:
        time_steps(setup)
        return
    if config.trainer.resume == "must" and newest_valid(run_dir) is None:
        raise InputError(f"trainer.resume=must: {run_dir} has no valid checkpoint")
    closing = probed[1] if probed and config.evaluation.closing else None
    with contextlib.ExitStack() as held:

        def begin() -> bool:
            """Takes the run directory; returns whether the run is finished."""
            rundir.make(run_dir)
            held.callback(rundir.Lock(run_dir).release)
            rundir.start(run_dir, resolved, hashes, vars(facts), vars(preprocess), command)
            point_latest(run_dir)
            return finished(run_dir, plan, closing)

        if distributed.first_alone(begin):
            print(f"already finished: {run_dir}")
            return
        with Signals() as signals:
            try:
                if not fit(setup, signals):
                    raise Interrupted
                if distributed.rank() == 0:
                    finish(config, setup, preprocess, probed, signals)
            except Interrupted:
                if distributed.rank() == 0:
                    print(f"stopped; the same command continues {run_dir}", file=sys.stderr)
                raise Stopped(signals.status) from None


def seed_generators(seed: int) -> None:
    """Every global generator: initial weights, dropout, and whatever a user's method draws."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _probed(config: Any, source: Source, preprocess: Preprocess) -> tuple[Source, Source] | None:
    """The labelled (train, test) that the run is judged on: eval_dataset, else the dataset itself, else nothing."""
    if config.eval_dataset is not None:
        train, test = labelled_sources(config.eval_dataset)
        refuse_other_images("this run", preprocess, train, "eval_dataset")
        return train, test
    return (source, build_source(config.dataset, "test")) if source.labelled else None


def run_directory_of(config: Any, resolved: dict, hashes: dict[str, str]) -> Path:
    """run_dir=, or runs/<dataset>/<method>-<backbone>-<fingerprint>-s<seed>."""
    if config.run_dir:
        return user_path(config.run_dir)
    names = config.names
    mark = fingerprint(decisive(resolved, hashes))
    return Path("runs") / names.dataset / f"{names.method}-{names.backbone}-{mark}-s{config.seed}"


def point_latest(run_dir: Path) -> None:
    """runs/latest, when the run lies below runs/."""
    runs = Path("runs").resolve()
    if runs in run_dir.resolve().parents:
        link, temporary = runs / "latest", runs / ".latest"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run_dir.resolve().relative_to(runs))
        temporary.replace(link)


def finished(run_dir: Path, plan: Plan, test: Source | None) -> bool:
    """Whether the weights of the last step and the closing results are there."""
    return (run_dir / rundir.BACKBONE).exists() and (test is None or _closing_there(run_dir, plan, test))


def _closing_there(run_dir: Path, plan: Plan, test: Source) -> bool:
    """Whether every closing result is on disk: two subjects, two protocols, top-1 and where it means something top-5."""
    records = [r for r in rundir.read_lines(run_dir / rundir.RESULTS) if r["details"].get("closing")]
    found = {(r["protocol"], r["subject"], r["metric"]) for r in records if r["step"] in (0, plan.total_steps)}
    return len(found) == 2 * 2 * (2 if len(test.classes) > 5 else 1)


def finish(
    config: Any, setup: Setup, preprocess: Preprocess, probed: tuple[Source, Source] | None, signals: Signals
) -> None:
    """The closing evaluation and, last of all, the backbone's weights."""
    run_dir, method = setup.run_dir, setup.method.eval()
    if probed and config.evaluation.closing and not _closing_there(run_dir, setup.plan, probed[1]):
        print("  evaluating", flush=True)
        records = closing_records(config, run_dir, method, preprocess, setup.plan, *probed, poll=signals.poll)
        append(run_dir / rundir.RESULTS, records)
        show(
            records,
            f"{probed[1].name}, {probed[1].split} split, {preprocess.words()}, frozen features after {setup.plan.epochs} epochs",
        )
    elif not probed:
        print(
            "  no labels to evaluate with: name labelled data with eval_dataset=…, or probe later with sslctl linear-eval"
        )
    temporary = run_dir / f".{rundir.BACKBONE}"
    save_tensors(temporary, method.backbone.state_dict(), {"step": str(setup.plan.total_steps)})
    temporary.replace(run_dir / rundir.BACKBONE)
    print(f"done: {run_dir}")


def describe_run(config: Any, plan: Plan, method: Method, preprocess: Preprocess, views: dict, run_dir: Path) -> None:
    """The plan, before anything happens."""
    backbone, names = method.backbone, config.names
    count = sum(p.numel() for p in backbone.parameters())
    made = ", ".join(f"{count} {group} of {size} px" for group, (count, size) in views.items())
    state = run_dir if not run_dir.exists() else f"{run_dir} (exists)"
    lines = [
        *plan.lines(),
        f"backbone   {names.backbone}: {count / 1e6:.2f} M parameters, {backbone.embed_dim} features,"
        f" stem {describe(backbone.network)}",
        f"method     {names.method}; views: {made}",
        f"run        {state}",
        *(f"note       {note}" for note in method.notes()),
    ]
    print("\n".join(lines), flush=True)


WARMING, TIMED = 3, 10  # steps of plan_only=true


def time_steps(setup: Setup) -> None:
    """Takes a few real steps in memory, and prints what the run will take and where the time goes; nothing is written."""
    plan, method, clock = setup.plan, setup.method, setup.clock
    with contextlib.closing(setup.batches(0)) as feed, told_of_memory(plan, method):
        for step, batch in enumerate(itertools.islice(feed, WARMING + TIMED)):
            train_step(setup, step, batch)
            if step == min(WARMING, plan.total_steps - 1) - 1:
                clock.split()
    split = clock.split()
    seconds = sum(split.values()) / max(1, min(TIMED, step + 1 - WARMING))
    tensors = [*method.state_dict().values()]
    tensors += [v for state in setup.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    if plan.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB on the GPU"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB"
    measured = ""
    if setup.knn is not None and plan.knn_every_steps:
        began = time.monotonic()
        method.eval()
        setup.knn(method, lambda: None)
        each, times = time.monotonic() - began, -(-plan.total_steps // plan.knn_every_steps) + 1
        measured = f" and {duration(each * times)} for the online kNN ({each:.1f} s, {times} times)"
    print(
        f"time       {1000 * seconds:.0f} ms a step, {plan.batch_size / seconds:,.0f} images/s:"
        f" about {duration(seconds * plan.total_steps)} of training{measured}"
    )
    print(f"spent on   {words(split)}")
    print(f"memory     {memory}; a checkpoint takes {size / 2**20:,.1f} MiB")
    print("plan_only=true: nothing was trained or written")
