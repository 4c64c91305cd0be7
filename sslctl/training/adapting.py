"""How a network with given weights goes on learning: what a configuration asks for, and the words of the plan."""

from typing import Any

from omegaconf import OmegaConf

from sslctl.errors import InputError
from sslctl.factory.expectation import has_weights
from sslctl.methods.base import Method
from sslctl.models.freezing import Freezing, describe_frozen
from sslctl.models.layer_decay import describe_decay
from sslctl.models.lora import describe_lora
from sslctl.models.network import Network
from sslctl.training.plan import Plan, Run


def build_freezing(node: Any, method: Method, plan: Plan) -> Freezing | None:
    """Returns what freezes the parts of a method's backbone that its configuration names; None where it names none."""
    freeze, epochs = (None, None) if node is None else (_plain(node.get("freeze")), node.get("freeze_epochs"))
    if freeze is None and epochs is not None:
        raise InputError(
            f"backbone.freeze_epochs={epochs:g}: of which parts? backbone.freeze=2 or names",
            advice=["backbone.freeze=2"],
        )
    return None if freeze is None else Freezing(method, freeze, _frozen_until(epochs, plan))


def adaptation_lines(config: Any, run: Run) -> list[str]:
    """Describes, a line a subject, what of a run's backbone learns otherwise than by default."""
    network, judged = run.method.backbone.network, run.method.judged
    return [
        *([f"result     the method's {judged} is judged and kept: network={judged}"] if judged else []),
        *_lora_line(config, network),
        *_frozen_line(config, run.plan, network),
        *describe_decay(network, config.optimizer.get("layer_decay", 1.0)),
    ]


def _lora_line(config: Any, network: Network) -> list[str]:
    lora = config.backbone.get("lora")
    if not lora or not lora.rank:
        return []
    return [
        f"lora       rank {lora.rank}, alpha {lora.alpha:g}: {describe_lora(network)} learn, merged where they are kept"
    ]


def _frozen_line(config: Any, plan: Plan, network: Network) -> list[str]:
    freeze, epochs = _plain(config.backbone.get("freeze")), config.backbone.get("freeze_epochs")
    if freeze is None:
        return []
    until = _frozen_until(epochs, plan)
    end = "to the end" if until is None else f"until epoch {epochs:g} (step {until:,})"
    given = has_weights(config.backbone) or config.continue_run
    weights = "" if given else ", with random weights: backbone.weights=… gives others"
    return [f"frozen     {describe_frozen(network, freeze)}, {end}{weights}"]


def _frozen_until(epochs: float | None, plan: Plan) -> int | None:
    """Returns the first step at which parts that are frozen for so many epochs learn; None where none is in the run."""
    until = None if epochs is None else round(epochs * plan.steps_per_epoch)
    return until if until is not None and until < plan.total_steps else None


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
