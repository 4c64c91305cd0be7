"""Parameter groups, LARS and clipping."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def parameter_groups(
    groups: list[dict], weight_decay: float, exclude_bias_and_norm: bool, vector_lr_scale: float = 1.0
) -> list[dict]:
    """Turns a method's groups into an optimizer's; parameters that ask for no gradient (teachers) are left out.

    exclude_bias_and_norm: biases and norms become groups of their own, without weight decay and without LARS, with
    vector_lr_scale times the learning rate. decay_scale: what the weight decay of a step is multiplied with, in each group.
    """
    result = []
    for group in groups:
        lr_scale, scale = group.get("lr_scale", 1.0), group.get("weight_decay_scale", 1.0)
        trained = [p for p in group["params"] if p.requires_grad]
        if exclude_bias_and_norm:
            parts = [
                ([p for p in trained if p.ndim > 1], scale, lr_scale, True),
                ([p for p in trained if p.ndim <= 1], 0.0, lr_scale * vector_lr_scale, False),
            ]
        else:
            parts = [(trained, scale, lr_scale, True)]
        result += [
            {
                "params": part,
                "weight_decay": weight_decay * by,
                "decay_scale": by,
                "adapt": adapt,
                "lr_scale": rate,
                "scheduled": group.get("scheduled", True),
            }
            for part, by, rate, adapt in parts
            if part
        ]
    return result


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017, arXiv:1708.03888), the learning rate outside the momentum buffer.

    g <- g + weight_decay·w; r = trust·|w| / |g|, 1 where either norm is 0; m <- momentum·m + r·g; w <- w - lr·m.
    Groups with adapt=False (biases, norms) keep r = 1; a weight decay of 0 does not switch r off.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float, trust: float, weight_decay: float = 0.0):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay, "adapt": True}
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            updates, weight_decay = [weight.grad for weight in weights], group["weight_decay"]
            if group["adapt"]:
                updates = torch._foreach_add(updates, weights, alpha=weight_decay)
                torch._foreach_mul_(updates, self._ratios(weights, updates, group["trust"]))
                weight_decay = 0.0  # it is in there
            for weight in weights:
                if "momentum" not in self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["momentum"] for weight in weights]
            torch._fused_sgd_(
                weights,
                updates,
                momenta,
                weight_decay=weight_decay,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,  # momenta begin as zeros
            )

    @staticmethod
    def _ratios(weights: list[Tensor], updates: list[Tensor], trust: float) -> list[Tensor]:
        """Calculates r of each weight, (), by the same few operations for all of them."""
        w, g = torch.stack(torch._foreach_norm([*weights, *updates])).view(2, -1)  # (tensors,) each
        # Updates so small that their squares are 0 have a norm of 0, too: r is 1, not as large as they are small.
        r = trust * w / F.threshold(g, 0.0, math.inf)  # 0 where either norm is
        return list(F.threshold(r, 0.0, 1.0).unbind())


def clip(method: nn.Module, limit: float | None) -> Tensor:
    """Scales the gradients to at most `limit` in global norm, when there is one; returns the norm before that."""
    trained = [p for p in method.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm
