"""fit(): the one loop that trains everything."""

import contextlib
import enum
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sslctl import distributed
from sslctl.data.batch import Batch
from sslctl.errors import say
from sslctl.models.batchnorm import separate_statistics
from sslctl.ops.timing import shares
from sslctl.runs import checkpoint
from sslctl.runs.claim import refuse_replaced
from sslctl.runs.generators import generator_states, restore_generators
from sslctl.runs.health import UNHEALTHY
from sslctl.runs.metrics import cut_metrics
from sslctl.signals import TO_BE_CONTINUED, Signals
from sslctl.training.accumulation import merge_outputs
from sslctl.training.interruptible import evaluate_online, start_epoch
from sslctl.training.logger import Log
from sslctl.training.memory import explain_out_of_memory
from sslctl.training.optim import clip
from sslctl.training.saved_state import load_optimizer_state, optimizer_state, refuse_other_layout
from sslctl.training.setup import Setup


class Outcome(enum.Enum):
    """How fit() ended; whatever it was, everything up to the last completed step is saved."""

    FINISHED = "finished"
    STOPPED = "stopped"  # by a signal; signals.status is its exit status
    UNHEALTHY = "unhealthy"  # by trainer.on_collapse=stop


def fit(setup: Setup, signals: Signals) -> Outcome:
    """Trains to the plan's last step, from the newest valid checkpoint on, and says how it ended.

    Raises NonFiniteError for a loss or gradient that is not finite, OutOfMemory with what would fit.
    """
    plan, method, precision, clock = setup.plan, setup.method, setup.precision, setup.clock
    first_step, online_is_logged = resume(setup)
    # Untrained weights are evaluated too, and so is a step whose evaluation was cut short.
    evaluating = plan.evaluates_online_after(first_step) and not online_is_logged
    log = Log(setup.run_dir, plan, first_step, setup.tensorboard, evaluating=evaluating)
    with log, contextlib.closing(setup.batches(first_step)) as feed, explain_out_of_memory(plan, method):
        if evaluating and not evaluate_online(setup, log, first_step):
            return Outcome.STOPPED
        clock.lap("starting")
        clock.split()  # belongs to no step

        for step in range(first_step, plan.total_steps):
            batch = fetch(setup, log, feed, step)

            # Once an epoch: DeepCluster-v2 assigns its clusters here, most methods do nothing.
            if step % plan.steps_per_epoch == 0 and not start_epoch(setup, step):
                if step > first_step:
                    precision.raise_if_nonfinite(plan.lr_at)
                    log.flush()
                    save(setup, step)
                return Outcome.STOPPED

            # One optimizer step: forward, backward, clip, update, then the method's own state.
            schedules, lr, output, grad_norm = train_step(setup, step, batch)
            completed = step + 1

            # What no checkpoint could hold shows once the optimizer has stepped: said now, not after an hour.
            if step == first_step:
                refuse_other_layout(method, setup.layout)
                optimizer_state(setup.optimizer, method)

            is_last = completed == plan.total_steps

            # Every process must stop after the same step, so they agree on it here, once: a later signal is the next step's.
            outcome = agree_to_stop(setup, signals)
            logging = is_last or plan.is_time(plan.log_every_steps, completed)
            saving = is_last or outcome or plan.is_time(plan.save_every_steps, completed)
            evaluating = plan.evaluates_online_after(completed)

            # On a GPU a loss that is not finite is noticed late: look before anything of this step is written.
            if logging or saving or evaluating:
                precision.raise_if_nonfinite(plan.lr_at)
            if logging:
                skipped = {"skipped_steps": precision.skipped} if plan.precision == "fp16" else {}
                values = {**scalars(output | {"grad_norm": grad_norm}), "lr": lr, **schedules, **skipped}
                log.record(completed, values | shares(clock.split()))
            if saving:
                log.flush()
                save(setup, completed)
                clock.lap("saving")
            if outcome:
                return outcome

            # The checkpoint of an evaluation that a signal cuts short lets the resumed run do it again.
            if evaluating:
                complete = evaluate_online(setup, log, completed)
                clock.lap("evaluation")
                if not complete:
                    log.flush()
                    save(setup, completed)
                    return Outcome.STOPPED

            # A run that is beyond saving says so now, not at its end; the next step's agreement stops it.
            if setup.watch and setup.watch.is_time(completed, plan.steps_per_epoch):
                setup.watch.check()
    return Outcome.FINISHED


def fetch(setup: Setup, log: Log, feed: Iterator[Batch], step: int) -> Batch:
    """Waits for the batch of a step. Where none comes, of a damaged image or a killed worker, what the steps before it have
    learned is saved before the error goes on up; not of several processes, the others of which are in their step."""
    try:
        return next(feed)
    except Exception:
        if step and distributed.world_size() == 1:
            setup.precision.raise_if_nonfinite(setup.plan.lr_at)
            log.flush()
            save(setup, step)
            say(f"  saved at step {step:,}")
        raise


def agree_to_stop(setup: Setup, signals: Signals) -> Outcome | None:
    """Asks all processes whether to stop after this step; None to go on. A signal that reached one, or the end of its time
    with room for one more save, stops all."""
    is_first = distributed.rank() == 0  # which knows how long a save takes, and speaks for all
    if (
        is_first
        and setup.ends_at is not None
        and time.monotonic() + setup.longest_save > setup.ends_at
        and not signals.status
    ):
        say("  trainer.max_hours is over")
        signals.status = TO_BE_CONTINUED
    unhealthy = setup.watch.stopping if setup.watch else 0
    status = distributed.all_reduce_max(signals.status or unhealthy)  # those of signals are above UNHEALTHY
    if not status:
        return None
    return Outcome.UNHEALTHY if status == UNHEALTHY else Outcome.STOPPED


def train_step(setup: Setup, step: int, batch: Batch) -> tuple[dict[str, float], float, dict[str, Any], Tensor]:
    """Takes one optimizer step.

    Returns the schedules' values, the learning rate, the method's output and the gradient's norm before clipping, ().
    """
    plan, method, optimizer, precision, clock = setup.plan, setup.method, setup.optimizer, setup.precision, setup.clock

    # Schedules are pure functions of the step, so a resumed run needs none of their state; so is what is frozen.
    if setup.freezing:
        setup.freezing.at(step)
    schedules, lr = method.schedules(step), plan.lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = (lr if group["scheduled"] else plan.lr) * group["lr_scale"]
        group["weight_decay"] = plan.weight_decay_at(step) * group["decay_scale"]
    method.before_step(schedules)
    clock.lap("optimizer")

    # Forward and backward, by parts of the batch where it is accumulated; the loss is the mean of theirs.
    precision.snapshot_batchnorm()
    outputs = []
    for part in batch.split(plan.accumulate_steps):
        with precision.autocast():
            output = method(part, schedules)
        clock.lap("forward")
        precision.scaler.scale(output["loss"] / plan.accumulate_steps).backward()
        outputs.append({name: value.detach() if isinstance(value, Tensor) else value for name, value in output.items()})
        clock.lap("backward")
    output = merge_outputs(outputs)

    # Every process calculated the same full loss on its own rows: the mean of their gradients is the loss's gradient.
    distributed.average_gradients(method.parameters(), separate_statistics(method))
    precision.unscale(optimizer)
    method.after_backward(schedules)
    grad_norm = clip(method, plan.clip_grad_norm)

    # Queue, centre and teacher are written only after a step that counts.
    if precision.should_step(step, lr, output["loss"], grad_norm, batch):
        optimizer.step()
        method.after_step(schedules, output.get("carry", {}))
    optimizer.zero_grad(set_to_none=True)
    clock.lap("optimizer")
    return schedules, lr, output, grad_norm


def resume(setup: Setup) -> tuple[int, bool]:
    """Loads the newest valid checkpoint; returns its step (0 for a fresh start) and whether its figures are logged.

    Global generators are restored here, right before the first batch is asked for.
    """
    newest = distributed.on_main_process(lambda: checkpoint.continue_from(setup.run_dir, setup.keep_last))
    torch.set_num_threads(setup.plan.threads)
    if newest is None:
        distributed.on_main_process(lambda: cut_metrics(setup.run_dir, -1))
        say("  starting at step 0: no checkpoint yet")
        if distributed.rank():  # dropout draws differently in every process; in the first as in a single one
            torch.manual_seed(torch.initial_seed() + distributed.rank())
        return 0, False

    # Weights into existing tensors, then the optimizer's and the loss scale's state.
    state = checkpoint.load(newest, setup.method)
    step, total = state["step"], setup.plan.total_steps
    if step > total:
        raise checkpoint.CheckpointError(f"{newest} is at step {step}, beyond the run's {total} steps")
    load_optimizer_state(setup.optimizer, state["optimizer"])
    setup.precision.load(state)

    # Bit for bit needs as many processes and threads as before; what cannot be had is said.
    processes, generators = len(state["generators"]), state["generators"]
    if processes != distributed.world_size():
        say(
            f"  saved by {processes} processes, continued by {distributed.world_size()}: equal to rounding, not bitwise"
        )
    elif state["threads"] != setup.plan.threads:
        say(f"  {state['threads']} threads as the run began with, not {setup.plan.threads}: results depend on it")
        torch.set_num_threads(state["threads"])

    # What was logged after the checkpoint will be logged again.
    records = distributed.on_main_process(lambda: cut_metrics(setup.run_dir, step))
    say(f"  resuming at step {step:,} of {total:,} ({newest})")
    restore_generators(generators[min(distributed.rank(), processes - 1)])
    if distributed.rank() >= processes:
        torch.manual_seed(step + distributed.rank())
    return step, any(r["step"] == step and "rankme" in r for r in records)


def save(setup: Setup, step: int) -> None:
    """Writes one checkpoint for all processes, with the generators of each."""
    refuse_other_layout(setup.method, setup.layout)
    state = {
        "step": step,
        "optimizer": optimizer_state(setup.optimizer, setup.method),
        "generators": distributed.all_gather_object(generator_states()),
        "threads": torch.get_num_threads(),
        **setup.precision.state(),
    }

    def write() -> None:
        begin = time.monotonic()
        refuse_replaced(setup.run_dir)
        checkpoint.save(setup.run_dir, step, setup.method, state, setup.keep_last, setup.description)
        setup.longest_save = max(setup.longest_save, time.monotonic() - begin)

    distributed.on_main_process(write)


def scalars(output: dict[str, Any]) -> dict[str, float]:
    """Fetches the loss and the metrics of a training step as numbers, all in one transfer."""
    tensors = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.ndim == 0}
    return dict(zip(tensors, torch.stack([value.float() for value in tensors.values()]).tolist(), strict=True))
