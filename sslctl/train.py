"""fit(): the one loop that trains everything."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sslctl import checkpoint
from sslctl.binding import bind
from sslctl.config import InputError
from sslctl.data.batch import Batch
from sslctl.data.loader import batches
from sslctl.data.sources import Source
from sslctl.logs import Log
from sslctl.methods.base import Method
from sslctl.optim import parameter_groups
from sslctl.plan import Plan
from sslctl.run_directory import cut_metrics
from sslctl.views import ViewMaker


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number, caught before optimizer, teacher or queue saw it."""


class Interrupted(Exception):
    """A signal arrived in a long calculation outside the steps; the weights are saved already."""


class Signals:
    """SIGTERM and SIGINT set a flag that long loops look at; a second Ctrl-C ends the process at once."""

    STATUS: ClassVar = {signal.SIGINT: 130, signal.SIGTERM: 143}

    def __init__(self) -> None:
        self.status = 0

    def __enter__(self) -> "Signals":
        main = threading.current_thread() is threading.main_thread()
        self.before = {s: signal.signal(s, self._caught) for s in self.STATUS} if main else {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _) -> None:
        if number == signal.SIGINT and self.status == 130:
            raise KeyboardInterrupt
        self.status = self.STATUS[signal.Signals(number)]
        print("\nsslctl: stopping after this step (Ctrl-C again to stop at once)", file=sys.stderr, flush=True)

    def poll(self) -> None:
        """Raises Interrupted when a signal has arrived."""
        if self.status:
            raise Interrupted


@dataclass
class Setup:
    """What fit() trains, with what, and where it leaves it."""

    plan: Plan
    method: Method
    optimizer: torch.optim.Optimizer
    batches: Callable[[int], Generator[Batch]]  # first step -> the batches from there to the end
    run_dir: Path
    keep_last: int
    tensorboard: bool
    describe: Callable[[int], str]  # an image's index -> where to find it
    knn: Callable[[Method, Callable[[], None]], float] | None = None  # the online evaluation


def build_optimizer(node: Any, method: Method, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a configuration over a method's trained parameters."""
    skip = ("base_lr", "lr_scaling", "weight_decay", "exclude_bias_and_norm")
    target, arguments = bind(node, "optimizer", skip=skip, given=("params", "lr"))
    groups = parameter_groups(method, node.weight_decay, node.exclude_bias_and_norm)
    if not groups:
        raise InputError("nothing to train: no parameter of the method asks for a gradient")
    try:
        return target(groups, lr=lr, **arguments)
    except ValueError as error:
        raise InputError(f"optimizer: {error}") from error


def set_up(
    config: Any,
    plan: Plan,
    method: Method,
    source: Source,
    views: ViewMaker,
    run_dir: Path,
    knn: Callable[[Method, Callable[[], None]], float] | None = None,
) -> Setup:
    """What fit() needs, from a configuration with optimizer, trainer and seed."""
    return Setup(
        plan=plan,
        method=method,
        optimizer=build_optimizer(config.optimizer, method, plan.lr),
        batches=lambda first: batches(
            source,
            views,
            batch_size=plan.batch_size,
            seed=config.seed,
            first_step=first,
            total_steps=plan.total_steps,
            workers=config.trainer.workers,
            device=plan.device,
        ),
        run_dir=run_dir,
        keep_last=config.trainer.keep_last,
        tensorboard=config.trainer.tensorboard,
        describe=source.describe,
        knn=knn,
    )


def fit(setup: Setup, signals: Signals) -> bool:
    """Trains to the plan's last step, continuing from the newest valid checkpoint.

    Returns False when a signal stopped it; everything up to the last completed step is saved then. Raises
    NonFiniteError before anything sees a loss or gradient that is not finite.
    """
    plan, method, optimizer = setup.plan, setup.method, setup.optimizer
    method.to(plan.device).train()
    if plan.channels_last:
        method.to(memory_format=torch.channels_last)
    first, known = resume(setup)
    log = Log(setup.run_dir, plan, first, setup.tensorboard)
    with log, contextlib.closing(setup.batches(first)) as feed:
        missing = plan.knn_due(first) and not known  # of untrained weights, or cut short by a signal
        if missing and not evaluate_online(setup, log, first, signals):
            return False
        for step, batch in enumerate(feed, start=first):
            if step % plan.steps_per_epoch == 0:
                method.start_epoch(step // plan.steps_per_epoch)
            s = method.schedules(step)
            lr = plan.lr * plan.schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            method.before_step(s)
            with torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
                out = method(batch, s)
            refuse_non_finite("loss", out["loss"], step, lr, batch, setup)
            out["loss"].backward()
            method.after_backward(s)
            norm = clip(method, plan.clip_grad_norm)
            refuse_non_finite("gradient", norm, step, lr, batch, setup)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(s, out.get("carry", {}))
            done = step + 1
            last, stopping = (
                done == plan.total_steps,
                bool(signals.status),
            )  # one look: a later signal is the next step's
            if last or plan.due(plan.log_every_steps, done):
                log.record(done, {**scalars(out), "grad_norm": norm.item(), "lr": lr, **s})
            if last or stopping or plan.due(plan.save_every_steps, done):
                log.flush()
                save(setup, done)
            if stopping:
                return False
            if plan.knn_due(done) and not evaluate_online(setup, log, done, signals):
                save(setup, done)
                return False
    return True


def resume(setup: Setup) -> tuple[int, bool]:
    """Loads the newest valid checkpoint; returns its step (0 for a fresh start) and whether its kNN is logged.

    Global generators are restored here, right before the first batch is asked for.
    """
    checkpoint.remove_leftovers(setup.run_dir)
    found = checkpoint.newest_valid(setup.run_dir)
    torch.set_num_threads(setup.plan.threads)
    if found is None:
        cut_metrics(setup.run_dir, -1)
        print("  starting at step 0: no checkpoint yet", flush=True)
        return 0, False
    state = checkpoint.load(found, setup.method)
    step, total = state["step"], setup.plan.total_steps
    if step > total:
        raise checkpoint.CheckpointError(f"{found} is at step {step}, beyond the run's {total} steps")
    setup.optimizer.load_state_dict(state["optimizer"])
    if state["threads"] != setup.plan.threads:
        print(f"  {state['threads']} threads as the run began with, not {setup.plan.threads}: results depend on it")
        torch.set_num_threads(state["threads"])
    kept = cut_metrics(setup.run_dir, step)
    print(f"  resuming at step {step:,} of {total:,} ({found})", flush=True)
    checkpoint.restore_generators(state["generators"])
    return step, any(r["step"] == step and "knn" in r for r in kept)


def save(setup: Setup, step: int) -> None:
    state = {
        "step": step,
        "optimizer": setup.optimizer.state_dict(),
        "generators": checkpoint.generators(),
        "threads": torch.get_num_threads(),
    }
    checkpoint.save(setup.run_dir, step, setup.method, state, setup.keep_last)


def evaluate_online(setup: Setup, log: Log, step: int, signals: Signals) -> bool:
    """Measures and logs the online kNN without leaving a trace in the training; False when a signal cut it short."""
    if setup.knn is None:
        return True
    before = checkpoint.generators()
    setup.method.eval()
    try:
        log.record(step, {"knn": setup.knn(setup.method, signals.poll)})
    except Interrupted:
        return False
    finally:
        setup.method.train()
        checkpoint.restore_generators(before)
    return True


def scalars(out: dict[str, Any]) -> dict[str, float]:
    """The loss and the metrics of a training step as numbers."""
    return {name: value.item() for name, value in out.items() if isinstance(value, Tensor) and value.ndim == 0}


def clip(method: Method, limit: float | None) -> Tensor:
    """Scales the gradients to at most `limit` in global norm, when there is one; returns the norm before that."""
    trained = [p for p in method.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm


def refuse_non_finite(what: str, value: Tensor, step: int, lr: float, batch: Batch, setup: Setup) -> None:
    """Raises NonFiniteError with the step, the learning rate and the images."""
    if torch.isfinite(value):
        return
    images = ", ".join(setup.describe(i) for i in batch.index[:4].tolist())
    raise NonFiniteError(
        f"{what} is {value.item()} at step {step} (lr {lr:.3g}); nothing of this step is kept. Its images begin with {images}."
        " A lower optimizer.base_lr, a longer warm-up or trainer.clip_grad_norm=1 usually helps"
    )
