"""Small networks, batches and optimizers for both sides, and a method's own step as one of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from parity_harness import ParityError, Side, Tensors, parameters_of, shake
from torch import Tensor, nn

from sslctl.data.batch import Batch
from sslctl.methods.base import Facts, Method
from sslctl.models.backbones import Backbone, SmallResNet, Timm
from sslctl.random import Key
from sslctl.training.optim import LARS, parameter_groups

ROWS, SIDE, PATCH = 8, 16, 4
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
EPSILON = 1e-3  # of both sides' Adam and AdamW, which make a full step of a gradient that is rounding alone

# --- Our side ---


def facts(**changes: int) -> Facts:
    values = {"channels": 3, "image_size": SIDE, "num_images": 64, "num_classes": 4, "batch_size": ROWS}
    return Facts(**values | {"steps_per_epoch": 10, "total_steps": 100} | changes)


def convolutional(seed: int = 0) -> Backbone:
    """A small residual network with BatchNorm."""
    torch.manual_seed(seed)
    return Backbone(SmallResNet([6, 12], 1, 1, "batch", 3, SIDE), MEAN, STD).double()


def transformer(**kwargs: Any) -> Backbone:
    """A small vision transformer of timm's."""
    torch.manual_seed(0)
    kwargs = {"patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2, **kwargs}
    backbone = Backbone(Timm("vit_tiny_patch16_224", 3, SIDE, kwargs), MEAN, STD).double()
    shake(backbone)
    return backbone


def batch(step: int, sizes: dict[str, tuple[int, int]] | None = None, rows: int = ROWS, images: int = 64) -> Batch:
    """A step's own random views. sizes: group -> (number of views, side); two global ones without."""
    generator = torch.Generator().manual_seed(100 + step)
    views = {
        group: torch.rand(count, rows, 3, side, side, generator=generator, dtype=torch.float64)
        for group, (count, side) in (sizes or {"global": (2, SIDE)}).items()
    }
    index = (torch.arange(rows) + rows * step) % images
    return Batch(views, index % 4, index, Key(0, step, index))


def global_views(step: int) -> Tensor:
    """Returns the global views (V, B, C, H, W) of a step's batch."""
    return batch(step).views["global"]


def ours(
    method: Method,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Batch],
    trained: Sequence[nn.Module | nn.Parameter],
    slow: Sequence[nn.Module] = (),
    state: Callable[[], Tensors] = dict,
) -> Side:
    """A method's steps as the training loop takes them. Raises ParityError if `trained` lacks a trained parameter."""
    lacking = {id(p) for p in method.parameters() if p.requires_grad} - {id(p) for _, p in parameters_of(trained)}
    if lacking:
        raise ParityError(f"{len(lacking)} trained parameters of {type(method).__name__} are not compared")

    def step(number: int) -> Tensor:
        values = method.schedules(number)
        method.before_step(values)
        optimizer.zero_grad()
        outputs = method(batches(number), values)
        outputs["loss"].backward()
        method.after_backward(values)
        optimizer.step()
        method.after_step(values, outputs.get("carry", {}))
        return outputs["loss"]

    return Side(step, trained, slow, state)


def optimizer_of(
    method: Method, kind: str, *, lr: float, weight_decay: float, exclude: bool = True, vector_lr_scale: float = 1.0
) -> torch.optim.Optimizer:
    """kind: sgd, lars, adam or adamw, over the method's own groups. exclude: no weight decay on biases and norms."""
    groups = parameter_groups(method.parameter_groups(), weight_decay, exclude, vector_lr_scale)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    makers = {
        "sgd": lambda: torch.optim.SGD(groups, lr=lr, momentum=0.9),
        "lars": lambda: LARS(groups, lr=lr, momentum=0.9, trust=0.001),
        "adam": lambda: torch.optim.Adam(groups, lr=lr, eps=EPSILON),
        "adamw": lambda: torch.optim.AdamW(groups, lr=lr, eps=EPSILON),
    }
    return makers[kind]()


# --- Their side ---


class Encoder(nn.Module):
    """A backbone as official codes want it: with a last layer fc, which they may replace."""

    def __init__(self, backbone: Backbone, num_classes: int | None = None):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Identity() if num_classes is None else nn.Linear(backbone.embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Takes an official code's step, and returns its loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def decayed(*modules: nn.Module, weight_decay: float) -> list[dict]:
    """Groups as the codes of MAE and I-JEPA make them: no weight decay for what has one dimension (biases and norms)."""
    groups = [[p for p in trainable(*modules) if (p.ndim == 1) == plain] for plain in (False, True)]
    return [{"params": group, "weight_decay": by} for group, by in zip(groups, (weight_decay, 0.0), strict=True)]


def settings(**values: Any) -> SimpleNamespace:
    """What an official script would have parsed from its command line."""
    return SimpleNamespace(**values)


class Without(nn.Module):
    """A module whose parameters are listed without some, by the ends of their names."""

    def __init__(self, module: nn.Module, *ends: str):
        super().__init__()
        self.module, self.ends = module, ends

    def named_parameters(self, *arguments: Any, **keywords: Any) -> Iterator[tuple[str, nn.Parameter]]:
        listed = super().named_parameters(*arguments, **keywords)
        return ((name, p) for name, p in listed if not name.endswith(self.ends))


@torch.no_grad()
def leave_out(*parameters: nn.Parameter) -> None:
    """Freezes at 0 what an official code has and does not use, or what a method does without."""
    for p in parameters:
        p.zero_().requires_grad_(False)


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in parameters_of(modules) if p.requires_grad]


def of_loss(loss: Callable[..., Tensor], *inputs: Tensor) -> Side:
    """A loss and its gradients to copies of its inputs, without an optimizer."""
    leaves = [nn.Parameter(x.clone()) for x in inputs]

    def step(_: int) -> Tensor:
        value = loss(*leaves)
        value.backward()
        return value

    return Side(step, leaves)


def sgd(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
