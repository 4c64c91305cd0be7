"""Values as they are: text that OmegaConf does not read for what it refers to."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf


def escaped(text: str) -> str:
    """Returns a text that an interpolation gives back as it is: ${…} in it is not looked up."""
    return re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + r"\${", text)


def as_config(values: dict[str, Any]) -> DictConfig:
    """Returns plain values, of a file, as a configuration in which nothing is looked up: no environment, no other key."""
    return OmegaConf.create(_escaped(values))


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return escaped(value) if isinstance(value, str) else value
