"""Training steps of a method beside reference steps that are written from its paper, in float64.

A reference step is a function `(its, batch, step, update) -> figures`. `its` holds the networks, parameters and buffers of the
method under their names, and nothing of the method's code. The step calculates the loss, hands it to `update` where the loop
calls backward and the optimizer, writes the state after (or before) that, and returns what the method should log besides.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sslctl.data.batch import Batch
from sslctl.methods.base import Facts, Method
from sslctl.models.backbones import Backbone, SmallResNet, Timm
from sslctl.models.batchnorm import synchronize_batchnorm
from sslctl.ops.timing import Clock
from sslctl.random import Key
from sslctl.training.optim import parameter_groups
from sslctl.training.precision import Precision
from sslctl.training.setup import Setup
from sslctl.training.train import train_step
from tests.steps.ranks import in_ranks

SIDE, ROWS, CHANNELS, IMAGES, CLASSES, STEPS_PER_EPOCH, TOTAL_STEPS = 8, 6, 3, 60, 4, 10, 40
LR, WEIGHT_DECAY = 0.2, 0.01  # the optimizer's highest rate; plain SGD
EXACTLY = {"rtol": 1e-7, "atol": 1e-9}


def rate_at(step: int) -> float:
    """The learning rate that the scheduler gives: half of the highest, and another at every step."""
    return LR / (2 + 0.1 * step)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """New tensors are float64 while it lasts, and what asks for fp32, as methods do of their outputs, stays so."""
    to_float, dtype = torch.Tensor.float, torch.get_default_dtype()
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = to_float
        torch.set_default_dtype(dtype)


# --- What a step is given ---


def facts(**changes) -> Facts:
    values = {
        "channels": CHANNELS,
        "image_size": SIDE,
        "num_images": IMAGES,
        "num_classes": CLASSES,
        "batch_size": ROWS,
    }
    return Facts(**values | {"steps_per_epoch": STEPS_PER_EPOCH, "total_steps": TOTAL_STEPS} | changes)


def backbone(widths: tuple[int, ...] = (4, 7), norm: str = "batch", seed: int = 0) -> Backbone:
    """A small convolutional network whose BatchNorms tell one batch from another."""
    torch.manual_seed(seed)
    return Backbone(SmallResNet([*widths], 1, 1, norm, CHANNELS, SIDE), [0.5, 0.4, 0.6], [0.3, 0.2, 0.25])


def transformer(seed: int = 0) -> Backbone:
    """A vision transformer of one block of width 8, for 2×2 patches."""
    torch.manual_seed(seed)
    arguments = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return Backbone(Timm("vit_tiny_patch16_224", CHANNELS, SIDE, arguments), [0.5, 0.4, 0.6], [0.3, 0.2, 0.25])


def batch_of(step: int, *, views: int = 2, crops: int = 0, rows: int = ROWS, side: int = SIDE, seed: int = 0) -> Batch:
    """Random images in an order of their own, each view a different picture of them; crops are half as large."""
    generator = torch.Generator().manual_seed(1000 * seed + step)

    def group(count: int, size: int) -> Tensor:
        image = torch.rand(1, rows, CHANNELS, size, size, generator=generator)
        return 0.4 * image + 0.6 * torch.rand(count, rows, CHANNELS, size, size, generator=generator)

    index = torch.randperm(IMAGES, generator=generator)[:rows]
    label = torch.randint(CLASSES, (rows,), generator=generator)
    images = {"global": group(views, side)} | ({"local": group(crops, side // 2)} if crops else {})
    return Batch(images, label, index, Key(seed, step // STEPS_PER_EPOCH, index))


def disturbed(method: Method, seed: int = 0, **buffers: Tensor) -> Method:
    """The method in float64 in the middle of its training: no teacher is its student, no BatchNorm as it began.

    buffers: values of some of its own buffers.
    """
    generator = torch.Generator().manual_seed(seed)
    method.double().train()
    if hasattr(method, "teacher"):
        method.teacher.network.double()  # frozen, and no module
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean += torch.randn(module.running_mean.shape, generator=generator, dtype=torch.float64)
                module.running_var *= 0.5 + torch.rand(
                    module.running_var.shape, generator=generator, dtype=torch.float64
                )
                module.num_batches_tracked.fill_(7)
        for name, value in buffers.items():
            method.get_buffer(name).copy_(value)
    return method


def begun(method: Method) -> Method:
    """The method as it is made, once that is looked at: queues and memories of random unit rows that are written from the
    first place on, slow networks that are the student."""
    for name, buffer in method.named_buffers(recurse=False):
        if name.endswith("pointer"):
            assert buffer == 0, name
        elif buffer.ndim == 2:
            torch.testing.assert_close(buffer.norm(dim=1), torch.ones(len(buffer)))
            assert buffer.std(0).min() > 0, name
    for name, slow in method.named_children():
        if name.startswith(("teacher_", "key_")):
            student = method.get_submodule(name.removeprefix("teacher_").removeprefix("key_"))
            _same(f"{name} at the start", slow.state_dict(), student.state_dict())
    return method


def units(rows: int, dim: int, seed: int = 0) -> Tensor:
    """Random rows of unit length, as queues and memories hold them."""
    rows = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


# --- The comparison ---


def compare(
    method: Method,
    reference: Callable[[nn.Module, Batch, int, Callable], dict],
    batches: list[Batch],
    *,
    networks: dict[str, Callable[[], nn.Module]] | None = None,
    first_step: int = 0,
    features: Callable[[nn.Module, Tensor], dict[str, Tensor]] | None = None,
    ranks: int = 2,
) -> nn.Module:
    """Takes the same steps by the training loop and by the reference, and compares everything after each of them.

    networks: the paper's own plain networks for some of the method's, whose weights must fit them; a network that is not
    given is copied. Those whose names begin with teacher_ or key_ are made as the student's, and take no gradient.
    features: of its networks and of images, what the method evaluates after the last step, in its order.
    ranks: of a run, that take the first step once more, each with its part of the images; 1 where it draws dropout.
    """
    its, copies = _twin(method, networks or {}), [copy.deepcopy(method) for _ in range(ranks)]
    with float64():
        _same_flags(method, its)
        setup = _setup(method)
        for step, batch in enumerate(batches, start=first_step):
            batch = _in_float64(batch)
            torch.manual_seed(step)
            _, _, output, _ = train_step(setup, step, batch)
            assert not any(carried.requires_grad for carried in output.pop("carry", {}).values()), "carry is detached"

            torch.manual_seed(step)
            update = _Update(its, step)
            figures = reference(its, batch, step, update)
            _same(f"step {step}, figures", output, figures | {"loss": update.loss})
            _same(f"step {step}, gradients", setup.optimizer.gradients, update.gradients)
            _same(f"step {step}, state", method.state_dict(), its.state_dict())
            if hasattr(method, "teacher"):
                _same(f"step {step}, teacher", method.teacher.network.state_dict(), its.teacher.state_dict())
            if step == first_step and ranks > 1:
                expected = (figures | {"loss": update.loss}, update.gradients, its.state_dict())
                _compare_ranks(copies, batch, step, expected)
        if features is not None:
            images = batch.views["global"][0]
            actual, expected = method.eval().features(images), features(its.eval(), images)
            assert list(actual) == list(expected), "features"
            _same("features", actual, expected)
    return its


def _compare_ranks(methods: list[Method], batch: Batch, step: int, expected: tuple[dict, dict, dict]) -> None:
    """Takes one step by several ranks, and compares figures, gradients and state of each with the reference's."""
    parts = batch.split(len(methods))

    def take(rank: int) -> tuple[dict, dict, dict]:
        synchronize_batchnorm(methods[rank])
        setup = _setup(methods[rank])
        output = train_step(setup, step, parts[rank])[2]
        output.pop("carry", None)
        return output, setup.optimizer.gradients, methods[rank].state_dict()

    for rank, outcome in enumerate(in_ranks(len(methods), take)):
        for what, *values in zip(("figures", "gradients", "state"), outcome, expected, strict=True):
            _same(f"rank {rank} of {len(methods)}, {what}", *values)


def of_projector(its: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Features of most methods: of the backbone, and of the projector on it."""
    return {"backbone": its.backbone(x), "projector": its.projector(its.backbone(x))}


def of_projector_and_teacher(its: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Those, and of the teacher's backbone."""
    return of_projector(its, x) | {"teacher": its.teacher_backbone(x)}


class _Update:
    """Backward and one step of plain SGD, as the loop would take it with the method's own parameter groups."""

    def __init__(self, its: nn.Module, step: int):
        self.its, self.step = its, step
        self.loss, self.gradients = None, {}

    def __call__(
        self,
        loss: Tensor,
        *,
        rates: dict[str, float] | None = None,
        decays: dict[str, float] | None = None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        """rates, decays: learning rates and factors of the weight decay of parameters whose names begin so, where they
        are not the schedule's and 1. after_backward: changes gradients."""
        self.loss = loss.detach()
        loss.backward()
        after_backward()
        with torch.no_grad():
            for name, parameter in self.its.named_parameters():
                if parameter.grad is None:
                    continue
                self.gradients[name] = parameter.grad
                rate, decay = _of(name, rates, rate_at(self.step)), WEIGHT_DECAY * _of(name, decays, 1.0)
                parameter -= rate * (parameter.grad + decay * parameter)
                parameter.grad = None


def _of(name: str, values: dict[str, float] | None, default: float) -> float:
    return next((value for prefix, value in (values or {}).items() if name.startswith(prefix)), default)


class _SGD:
    """Plain SGD over the method's own parameter groups, in which the loop sets the rates. Keeps the gradients of its step."""

    def __init__(self, method: Method):
        groups = parameter_groups(method.parameter_groups(), WEIGHT_DECAY, exclude_bias_and_norm=False)
        self.param_groups, self.method, self.gradients = groups, method, {}

    @torch.no_grad()
    def step(self) -> None:
        self.gradients = {name: p.grad for name, p in self.method.named_parameters() if p.grad is not None}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * (p.grad + group["weight_decay"] * p)

    def zero_grad(self, set_to_none: bool) -> None:
        for p in self.method.parameters():
            p.grad = None


def _setup(method: Method) -> Setup:
    """What the loop is given to take a step with."""
    cpu = torch.device("cpu")
    plan = SimpleNamespace(lr=LR, lr_at=rate_at, weight_decay_at=lambda step: WEIGHT_DECAY)
    plan.accumulate_steps, plan.clip_grad_norm = 1, None
    precision = Precision("fp32", cpu, method, str)
    return Setup(
        plan, method, _SGD(method), precision, Clock(cpu), iter, Path(), keep_last=1, tensorboard=False, layout={}
    )


def _twin(method: Method, networks: dict[str, Callable[[], nn.Module]]) -> nn.Module:
    """The method's networks, parameters and buffers without its code."""
    its = nn.Module()
    for name, child in method.named_children():
        slow = name.startswith(("teacher_", "key_"))
        make = networks.get(name.removeprefix("teacher_").removeprefix("key_"))
        network = copy.deepcopy(child) if make is None else make().double()
        network.load_state_dict(child.state_dict())
        its.add_module(name, network.requires_grad_(False) if slow else network)
    for name, parameter in method.named_parameters(recurse=False):
        its.register_parameter(name, copy.deepcopy(parameter))
    for name, buffer in method.named_buffers(recurse=False):
        its.register_buffer(name, buffer.clone(), persistent=name not in method._non_persistent_buffers_set)
    if hasattr(method, "teacher"):
        its.__dict__["teacher"] = copy.deepcopy(method.teacher.network)  # no part of its state either
    return its.train()


def _in_float64(batch: Batch) -> Batch:
    views = {name: view.double() if view.is_floating_point() else view for name, view in batch.views.items()}
    return Batch(views, batch.label, batch.index, batch.key, batch.targets)


def _same_flags(method: Method, its: nn.Module) -> None:
    actual, expected = ({name: p.requires_grad for name, p in module.named_parameters()} for module in (method, its))
    assert actual == expected, "which parameters ask for a gradient"


def _same(what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys(), what
    for name, value in expected.items():
        value = torch.as_tensor(value, dtype=actual[name].dtype)
        torch.testing.assert_close(
            actual[name], value, **EXACTLY, msg=lambda text, name=name: f"{what}: {name}\n{text}"
        )


# --- What references share ---


def spread(h: Tensor) -> Tensor:
    """Logged as feature_std: √D times the mean standard deviation of unit rows (SimSiam, section 4.1)."""
    h = h.detach() / h.detach().norm(dim=1, keepdim=True)
    return h.std(dim=0).mean() * h.shape[1] ** 0.5


def unit(z: Tensor) -> Tensor:
    """Rows of unit length."""
    return z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12)
