"""fp32, bf16 and fp16: autocast, loss scaling, and what happens to a loss or gradient that is not finite."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from sslctl.data.batch import Batch
from sslctl.methods.base import Method
from sslctl.models.batchnorm import running_statistics

MOST_SKIPPED = 20  # overflowed fp16 steps in a row


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number; nothing of its step is saved."""


def prepare_device(device: torch.device, *, tf32: bool, deterministic: bool) -> None:
    """Makes torch's process-wide settings. tf32: for convolutions only, products in losses stay fp32."""
    torch.use_deterministic_algorithms(deterministic)
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made


class Precision:
    """Runs forward passes in a precision and decides which steps count.

    fp32, bf16: a step whose loss or gradient is not finite stops the run. On a CPU at once, before optimizer, teacher
    and queue. On a GPU, which is not waited for, the first such step is noted there and found by the next
    `raise_if_nonfinite`, before anything is logged or saved. fp16: such a step is skipped, the loss scale halved; 20 in a
    row stop the run.
    """

    def __init__(self, name: str, device: torch.device, method: Method, describe: Callable[[int], str]):
        self.device, self.describe = device, describe
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self.skipped = self.skipped_in_a_row = 0
        self.statistics = running_statistics(method) if self.scaler.is_enabled() else []
        self.before: list[Tensor] = []  # the statistics before the step
        self.first: tuple[Tensor, Tensor, Tensor] | None = None  # step (-1: none), (loss, norm), images; on a GPU

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def snapshot_batchnorm(self) -> None:
        """Remembers BatchNorm's running statistics: an overflow in the forward pass would stay in them for good."""
        self.before = [tensor.clone() for tensor in self.statistics]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the loss scale out of the gradients."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)

    def should_step(self, step: int, lr: float, loss: Tensor, norm: Tensor, batch: Batch) -> bool:
        """Tells whether the optimizer may take the step. norm: of the unscaled gradients. Raises NonFiniteError."""
        if self.device.type == "cuda" and not self.scaler.is_enabled():
            self._note(step, loss, norm, batch)
            return True
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if not self.scaler.is_enabled():
            if not finite:
                self._raise(step, lr, loss.item(), norm.item(), batch.index)
            return True
        self.scaler.update()
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            self.skipped += 1
            for tensor, before in zip(self.statistics, self.before, strict=True):
                tensor.copy_(before)
            if self.skipped_in_a_row == MOST_SKIPPED:
                self._raise(
                    step, lr, loss.item(), norm.item(), batch.index, f" in {MOST_SKIPPED} steps in a row of fp16"
                )
        return finite

    def _note(self, step: int, loss: Tensor, norm: Tensor, batch: Batch) -> None:
        values, images = torch.stack([loss.detach().float(), norm]), batch.index[:4]
        if self.first is None:
            self.first = torch.full((), -1, device=self.device), values, images
        bad = (self.first[0] < 0) & ~torch.isfinite(values).all()
        now = torch.full((), step, device=self.device), values, images
        self.first = tuple(torch.where(bad, new, old) for new, old in zip(now, self.first, strict=True))

    def raise_if_nonfinite(self, lr_of: Callable[[int], float]) -> None:
        """Raises NonFiniteError when a step since the last call was not finite; waits for the GPU."""
        if self.first is None:
            return
        step = int(self.first[0])
        if step >= 0:
            self._raise(step, lr_of(step), *self.first[1].tolist(), self.first[2])

    def _raise(self, step: int, lr: float, loss: float, norm: float, index: Tensor, where: str = "") -> None:
        what = f"loss is {loss}" if loss - loss != 0 else f"gradient is {norm}"  # ∞ - ∞ is no 0 either
        images = ", ".join(self.describe(i) for i in index[:4].tolist())
        raise NonFiniteError(
            f"{what} at step {step}{where} (lr {lr:.3g}); nothing of this step is kept. Its images begin with {images}."
            " A lower optimizer.base_lr, a longer warm-up or trainer.clip_grad_norm=1 usually helps"
        )

    def state(self) -> dict:
        return {"scaler": self.scaler.state_dict(), "skipped": [self.skipped, self.skipped_in_a_row]}

    def load(self, state: dict) -> None:
        self.skipped, self.skipped_in_a_row = state["skipped"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
