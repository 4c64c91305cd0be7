"""What the loop is given: the method on its device, the optimizer over its parameters, and where the batches come from."""

import inspect
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslctl.config.targets import bind, build
from sslctl.data.batch import Batch
from sslctl.data.loader import batches
from sslctl.errors import InputError
from sslctl.methods.base import Embed, Method
from sslctl.models.batchnorm import synchronize_batchnorm
from sslctl.models.freezing import Freezing
from sslctl.models.layer_decay import decayed
from sslctl.models.recomputation import recompute_
from sslctl.ops.timing import Clock
from sslctl.runs.health import Watch
from sslctl.training.accumulation import refuse_inexact_accumulation
from sslctl.training.adapting import build_freezing
from sslctl.training.logger import Log
from sslctl.training.memory import refuse_beyond_memory
from sslctl.training.optim import parameter_groups
from sslctl.training.plan import Plan, Run
from sslctl.training.precision import Precision, prepare_device
from sslctl.training.saved_state import layout_of

OnlineEvaluation = Callable[[Method, Log, int], None]  # logs the figures and pictures of a step; a signal interrupts it


@dataclass
class Setup:
    """Holds what fit() trains, with what, and where it leaves it."""

    plan: Plan
    method: Method
    optimizer: torch.optim.Optimizer
    precision: Precision
    clock: Clock
    batches: Callable[[int], Generator[Batch]]  # first step -> the batches from there to the last step
    run_dir: Path
    keep_last: int
    tensorboard: bool
    layout: dict[str, torch.Tensor]  # of the method's tensors, as a resume will build them
    description: dict[str, Any] | None = (
        None  # {"config", "environment"} of a run, once it is claimed, in the first process
    )
    freezing: Freezing | None = None  # of parts of the backbone
    embed: Embed | None = None  # a function over all clean images
    online: OnlineEvaluation | None = None  # the online evaluation
    watch: Watch | None = None  # of the run's health, in the first process
    ends_at: float | None = None  # by the monotonic clock, of trainer.max_hours
    longest_save: float = 0.0  # seconds


def build_optimizer(node: Any, method: Method, plan: Plan) -> torch.optim.Optimizer:
    """Builds a configuration's optimizer over a method's trained parameters, torch's fused one where there is one."""
    target, arguments = bind(node, "optimizer", given=("params", "lr"), kind=torch.optim.Optimizer)
    closure = inspect.signature(target.step).parameters.get("closure") if inspect.isclass(target) else None
    if closure is not None and closure.default is closure.empty:
        raise InputError(
            f"optimizer._target_={node.get('_target_')} calculates the loss several times a step: expected another"
        )
    groups, layer_decay = method.parameter_groups(), node.get("layer_decay", 1.0)
    if layer_decay != 1:
        groups = decayed(groups, method.backbone.network, layer_decay)
    groups = parameter_groups(groups, node.weight_decay, node.exclude_bias_and_norm, node.get("vector_lr_scale", 1.0))
    if not groups:
        raise InputError("nothing to train: no parameter of the method asks for a gradient")
    fused = "fused" in inspect.signature(target).parameters and target is not torch.optim.SGD  # fails on thawed weights
    if fused and "fused" not in node and plan.device.type in ("cpu", "cuda"):
        arguments["fused"] = True
    return build("optimizer", target, groups, lr=plan.lr, **arguments)


def set_up(
    config: Any,
    run: Run,
    embed: Embed | None = None,
    online: OnlineEvaluation | None = None,
    watch: Watch | None = None,
) -> Setup:
    """Prepares device, method, optimizer and batches for fit(). The method is moved to its device.

    config: has the nodes optimizer and trainer, and seed.
    """
    plan, method = run.plan, run.method
    prepare_device(plan.device, tf32=config.trainer.tf32, deterministic=config.trainer.deterministic)
    synchronize_batchnorm(method)
    refuse_beyond_memory(plan, method, config.optimizer)
    method.to(plan.device).train()
    if plan.channels_last:
        method.to(memory_format=torch.channels_last)
    # What never learns has no place in the optimizer; what will, has one from the beginning on.
    freezing = build_freezing(config.get("backbone"), method, plan)
    if freezing and freezing.until is None:
        freezing.at(0)
    refuse_inexact_accumulation(plan, method, config.trainer.accumulate_approximately)
    if config.trainer.activation_checkpointing:
        if config.trainer.compile:
            raise InputError(
                "trainer.compile=true chooses itself what is calculated again: trainer.activation_checkpointing=false",
                advice=["trainer.activation_checkpointing=false"],
            )
        recompute_(method.backbone.network)
    if config.trainer.compile:
        torch.compiler.reset()  # after a few other shapes, a sweep's earlier jobs, torch compiles no more and says little
        for child in method.children():  # losses and what follows a schedule or a key stay outside the graphs
            child.compile(dynamic=False)
    optimizer = build_optimizer(config.optimizer, method, plan)
    if freezing:
        freezing.at(0)
        if not any(parameter.requires_grad for parameter in method.parameters()):
            raise InputError(f"backbone.freeze={config.backbone.freeze} leaves nothing to learn before it ends")
    clock = Clock(plan.device)
    return Setup(
        plan=plan,
        method=method,
        optimizer=optimizer,
        precision=Precision(plan.precision, plan.device, method, run.source.describe),
        clock=clock,
        batches=lambda first: batches(
            run.source,
            run.views,
            batch_size=plan.batch_size,
            seed=config.seed,
            first_step=first,
            total_steps=plan.total_steps,
            workers=config.trainer.workers,
            device=plan.device,
            clock=clock,
        ),
        run_dir=run.run_dir,
        keep_last=config.trainer.keep_last,
        tensorboard=config.trainer.tensorboard,
        freezing=freezing,
        layout=layout_of(method),
        embed=embed,
        online=online,
        watch=watch,
        ends_at=None if config.trainer.max_hours is None else time.monotonic() + 3600 * config.trainer.max_hours,
    )
