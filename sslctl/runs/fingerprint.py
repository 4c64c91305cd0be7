"""The fingerprint of a run: what of its configuration can change a weight."""

import hashlib
import json
from typing import Any

# Keys that cannot change a weight: moving the data, watching more closely or evaluating otherwise is the same run.
_NOT_IN_FINGERPRINT = (
    *("seed", "run_dir", "plan_only", "names", "recipe", "eval_dataset", "evaluation", "probe"),
    *("dataset.root", "dataset.memory_gb", "dataset.download", "dataset.scale", "backbone.weights", "method.teacher"),
    *(
        "trainer.device",
        "trainer.processes",
        "trainer.workers",
        "trainer.threads",
        "trainer.resume",
        "trainer.tensorboard",
        "trainer.on_collapse",
    ),
    *("trainer.log_every_steps", "trainer.save_every_epochs", "trainer.save_every_steps", "trainer.keep_last"),
)


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    result = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def fingerprint_keys(config: dict, hashes: dict[str, str]) -> dict[str, Any]:
    """The flat keys of a resolved configuration that can change a weight, and the hashes of the files it reads."""
    below = tuple(f"{key}." for key in _NOT_IN_FINGERPRINT)
    keys = {k: v for k, v in flat(config).items() if k not in _NOT_IN_FINGERPRINT and not k.startswith(below)}
    return keys | {f"content of {name}": digest for name, digest in hashes.items()}


def fingerprint(keys: dict[str, Any]) -> str:
    """Eight hex digits of the keys that count."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]
