"""fit(): the one loop that trains everything."""

import contextlib
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslctl import distributed
from sslctl.config.targets import bind
from sslctl.data.batch import Batch
from sslctl.data.loader import batches
from sslctl.data.sources import Source
from sslctl.errors import InputError
from sslctl.factory.from_config import OPTIMIZER_OWN
from sslctl.methods.base import Embed, Method
from sslctl.models.batchnorm import separate_statistics, synchronize_batchnorm
from sslctl.ops.timing import Clock, shares
from sslctl.runs import checkpoint
from sslctl.runs.directory import cut_metrics
from sslctl.runs.health import Watch
from sslctl.signals import Interrupted, Signals
from sslctl.training.accumulation import explain_out_of_memory, merge_outputs, refuse_inexact_accumulation
from sslctl.training.logger import Log
from sslctl.training.optim import clip, parameter_groups
from sslctl.training.plan import Plan
from sslctl.training.precision import Precision, prepare_device
from sslctl.views import ViewMaker

Online = Callable[[Method, Log, int, Callable[[], None]], None]  # logs figures and pictures of a step; polls


@dataclass
class Setup:
    """What fit() trains, with what, and where it leaves it."""

    plan: Plan
    method: Method
    optimizer: torch.optim.Optimizer
    precision: Precision
    clock: Clock
    batches: Callable[[int], Generator[Batch]]  # first step -> the batches from there to the end
    run_dir: Path
    keep_last: int
    tensorboard: bool
    embed: Embed | None = None  # a function over all clean images
    online: Online | None = None  # the online evaluation
    watch: Watch | None = None  # of the run's health, in the first process


def build_optimizer(node: Any, method: Method, plan: Plan) -> torch.optim.Optimizer:
    """The optimizer of a configuration over a method's trained parameters; torch's fused one where there is one."""
    target, arguments = bind(node, "optimizer", skip=OPTIMIZER_OWN, given=("params", "lr"))
    groups = parameter_groups(
        method.parameter_groups(), node.weight_decay, node.exclude_bias_and_norm, node.get("vector_lr_scale", 1.0)
    )
    if not groups:
        raise InputError("nothing to train: no parameter of the method asks for a gradient")
    fused = "fused" in inspect.signature(target).parameters and target is not torch.optim.SGD  # fails on thawed weights
    if fused and "fused" not in node and plan.device.type in ("cpu", "cuda"):
        arguments["fused"] = True
    try:
        return target(groups, lr=plan.lr, **arguments)
    except ValueError as error:
        raise InputError(f"optimizer: {error}") from error


def set_up(
    config: Any,
    plan: Plan,
    method: Method,
    source: Source,
    views: ViewMaker,
    run_dir: Path,
    embed: Embed | None = None,
    online: Online | None = None,
    watch: Watch | None = None,
) -> Setup:
    """What fit() needs, from a configuration with optimizer, trainer and seed. The method is moved to its device."""
    prepare_device(plan.device, tf32=config.trainer.tf32, deterministic=config.trainer.deterministic)
    synchronize_batchnorm(method)
    method.to(plan.device).train()
    if plan.channels_last:
        method.to(memory_format=torch.channels_last)
    refuse_inexact_accumulation(plan, method, config.trainer.accumulate_approximately)
    if config.trainer.compile:
        torch.compiler.reset()  # after a few other shapes, a sweep's earlier jobs, torch compiles no more and says little
        for child in method.children():  # losses and what follows a schedule or a key stay outside the graphs
            child.compile(dynamic=False)
    clock = Clock(plan.device)
    return Setup(
        plan=plan,
        method=method,
        optimizer=build_optimizer(config.optimizer, method, plan),
        precision=Precision(plan.precision, plan.device, method, source.describe),
        clock=clock,
        batches=lambda first: batches(
            source,
            views,
            batch_size=plan.batch_size,
            seed=config.seed,
            first_step=first,
            total_steps=plan.total_steps,
            workers=config.trainer.workers,
            device=plan.device,
            clock=clock,
        ),
        run_dir=run_dir,
        keep_last=config.trainer.keep_last,
        tensorboard=config.trainer.tensorboard,
        embed=embed,
        online=online,
        watch=watch,
    )


def fit(setup: Setup, signals: Signals) -> bool:
    """Trains to the plan's last step, from the newest valid checkpoint on.

    Returns False when a signal or its health (signals.status is 1 then) stopped it; everything up to the last
    completed step is saved then. Raises NonFiniteError for a loss or gradient that is not finite, OutOfMemory with what
    would fit.
    """
    plan, method, precision, clock = setup.plan, setup.method, setup.precision, setup.clock
    first, known = resume(setup)
    log = Log(setup.run_dir, plan, first, setup.tensorboard)
    with log, contextlib.closing(setup.batches(first)) as feed, explain_out_of_memory(plan, method):
        missing = plan.knn_due(first) and not known  # of untrained weights, or cut short by a signal
        if missing and not evaluate_online(setup, log, first, signals):
            return False
        clock.lap("starting")
        clock.split()
        for step, batch in enumerate(feed, start=first):
            if step % plan.steps_per_epoch == 0 and not begin_epoch(setup, step, signals):
                if step > first:
                    precision.raise_if_nonfinite(plan.lr_at)
                    save(setup, step)
                return False
            s, lr, out, norm = train_step(setup, step, batch)
            done = step + 1
            last = done == plan.total_steps
            unhealthy = setup.watch.stopping if setup.watch else 0
            stopping = distributed.all_reduce_max(
                signals.status or unhealthy
            )  # one look: a later signal is the next step's
            logging = last or plan.is_time(plan.log_every_steps, done)
            saving = last or stopping or plan.is_time(plan.save_every_steps, done)
            if logging or saving or plan.knn_due(done):
                precision.raise_if_nonfinite(plan.lr_at)
            if logging:
                skipped = {"skipped_steps": precision.skipped} if plan.precision == "fp16" else {}
                values = {**scalars(out | {"grad_norm": norm}), "lr": lr, **s, **skipped}
                log.record(done, values | shares(clock.split()))
            if saving:
                log.flush()
                save(setup, done)
                clock.lap("saving")
            if stopping:
                if plan.processes > 1 or stopping == unhealthy:
                    signals.status = stopping  # another process's, perhaps, or no signal's at all
                return False
            if plan.knn_due(done):
                complete = evaluate_online(setup, log, done, signals)
                clock.lap("evaluation")
                if not complete:
                    save(setup, done)
                    return False
            if setup.watch and setup.watch.is_time(done, plan.steps_per_epoch):
                setup.watch.check()
    return True


def begin_epoch(setup: Setup, step: int, signals: Signals) -> bool:
    """What a method does before the first step of an epoch, by the first process for all.

    False when a signal cut it short: all is then as it was before.
    """
    method = setup.method
    if type(method).start_epoch is Method.start_epoch:
        return True
    state = method.state_dict()

    def begun() -> bool:
        before, drawn = {name: tensor.clone() for name, tensor in state.items()}, checkpoint.generators()
        try:
            method.start_epoch(step // setup.plan.steps_per_epoch, replace(setup.embed, poll=signals.poll))
        except Interrupted:
            for name, tensor in state.items():
                tensor.copy_(before[name])
            checkpoint.restore_generators(drawn)
            return False
        return True

    complete = distributed.on_main_process(begun)
    distributed.broadcast_from_main(*state.values())
    setup.clock.lap("evaluation")
    signals.status = distributed.all_reduce_max(signals.status)
    return complete


def train_step(setup: Setup, step: int, batch: Batch) -> tuple[dict[str, float], float, dict[str, Any], Tensor]:
    """One optimizer step. Returns the schedules' values, the learning rate, the method's output and the gradient's norm."""
    plan, method, optimizer, precision, clock = setup.plan, setup.method, setup.optimizer, setup.precision, setup.clock
    s, lr = method.schedules(step), plan.lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = (lr if group["scheduled"] else plan.lr) * group["lr_scale"]
        group["weight_decay"] = plan.weight_decay_at(step) * group["decay_scale"]
    method.before_step(s)
    clock.lap("optimizer")
    precision.snapshot_batchnorm()
    parts = []
    for part in batch.split(plan.accumulate_steps):
        with precision.autocast():
            out = method(part, s)
        clock.lap("forward")
        precision.scaler.scale(out["loss"] / plan.accumulate_steps).backward()
        parts.append({name: value.detach() if isinstance(value, Tensor) else value for name, value in out.items()})
        clock.lap("backward")
    out = merge_outputs(parts)
    distributed.average_gradients(method.parameters(), separate_statistics(method))
    precision.unscale(optimizer)
    method.after_backward(s)
    norm = clip(method, plan.clip_grad_norm)
    if precision.should_step(step, lr, out["loss"], norm, batch):
        optimizer.step()
        method.after_step(s, out.get("carry", {}))
    optimizer.zero_grad(set_to_none=True)
    clock.lap("optimizer")
    return s, lr, out, norm


def resume(setup: Setup) -> tuple[int, bool]:
    """Loads the newest valid checkpoint; returns its step (0 for a fresh start) and whether its figures are logged.

    Global generators are restored here, right before the first batch is asked for.
    """
    found = distributed.on_main_process(lambda: checkpoint.continue_from(setup.run_dir))
    torch.set_num_threads(setup.plan.threads)
    if found is None:
        distributed.on_main_process(lambda: cut_metrics(setup.run_dir, -1))
        print("  starting at step 0: no checkpoint yet", flush=True)
        if distributed.rank():  # dropout draws differently in every process; in the first as in a single one
            torch.manual_seed(torch.initial_seed() + distributed.rank())
        return 0, False
    state = checkpoint.load(found, setup.method)
    step, total = state["step"], setup.plan.total_steps
    if step > total:
        raise checkpoint.CheckpointError(f"{found} is at step {step}, beyond the run's {total} steps")
    setup.optimizer.load_state_dict(state["optimizer"])
    setup.precision.load(state)
    processes, generators = len(state["generators"]), state["generators"]
    if processes != distributed.world_size():
        print(
            f"  saved by {processes} processes, continued by {distributed.world_size()}: equal to rounding, not bitwise"
        )
    elif state["threads"] != setup.plan.threads:
        print(f"  {state['threads']} threads as the run began with, not {setup.plan.threads}: results depend on it")
        torch.set_num_threads(state["threads"])
    kept = distributed.on_main_process(lambda: cut_metrics(setup.run_dir, step))
    print(f"  resuming at step {step:,} of {total:,} ({found})", flush=True)
    checkpoint.restore_generators(generators[min(distributed.rank(), processes - 1)])
    if distributed.rank() >= processes:
        torch.manual_seed(step + distributed.rank())
    return step, any(r["step"] == step and "rankme" in r for r in kept)


def save(setup: Setup, step: int) -> None:
    """One checkpoint for all processes, with the generators of each."""
    state = {
        "step": step,
        "optimizer": setup.optimizer.state_dict(),
        "generators": distributed.all_gather_object(checkpoint.generators()),
        "threads": torch.get_num_threads(),
        **setup.precision.state(),
    }
    distributed.on_main_process(lambda: checkpoint.save(setup.run_dir, step, setup.method, state, setup.keep_last))


def evaluate_online(setup: Setup, log: Log, step: int, signals: Signals) -> bool:
    """The online figures and pictures of a step, without leaving a trace in the training.

    False when a signal cut it short.
    """

    def measured() -> bool:
        try:
            if setup.online:
                setup.online(setup.method, log, step, signals.poll)
        except Interrupted:
            return False
        return True

    before = checkpoint.generators()
    setup.method.eval()
    try:
        return distributed.on_main_process(measured)
    finally:
        setup.method.train()
        checkpoint.restore_generators(before)


def scalars(out: dict[str, Any]) -> dict[str, float]:
    """The loss and the metrics of a training step as numbers, fetched together."""
    found = {name: value for name, value in out.items() if isinstance(value, Tensor) and value.ndim == 0}
    return dict(zip(found, torch.stack([value.float() for value in found.values()]).tolist(), strict=True))
