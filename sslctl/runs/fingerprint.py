"""The fingerprint of a run: what of its configuration can change a weight."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sslctl.config.keys import ALWAYS_COUNTS, facts_along
from sslctl.config.schema import SCHEMAS
from sslctl.errors import InputError


def flat(config: dict, prefix: str = "") -> dict[str, Any]:
    """Flattens a configuration, {"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    result = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def fingerprint_keys(config: dict, hashes: dict[str, str]) -> dict[str, Any]:
    """Returns the flat keys of a resolved configuration that can change a weight, and the hashes of the files it reads.

    A key that has the value of its old behaviour is left out: before there was the key, every run did that.
    """
    keys = {key: value for key, value in flat(config).items() if _counts(key, value)}
    return keys | {f"content of {name}": digest for name, digest in hashes.items()}


def _counts(key: str, value: Any) -> bool:
    facts = facts_along(SCHEMAS["pretrain"], key)
    return all(f.fingerprint for f in facts) and value != facts[-1].old_behaviour


def value_of(keys: dict[str, Any], key: str) -> Any:
    """Returns a key's value among fingerprint keys; of one that is left out, that of its old behaviour, or None."""
    unstated = facts_along(SCHEMAS["pretrain"], key)[-1].old_behaviour
    return keys.get(key, None if unstated is ALWAYS_COUNTS else unstated)


def fingerprint(keys: dict[str, Any]) -> str:
    """Returns eight hex digits of the keys that count."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]


def default_directory(config: Any, keys: dict[str, Any], kind: str | None = None) -> Path:
    """Returns runs/<dataset>/<method>-<backbone>-<fingerprint>-s<seed>, where a run goes that is told no place.

    kind: a word in the method's place. Raises InputError for names that no folder can have.
    """
    names = config.names
    for key in ("dataset", "method", "backbone"):
        if {"", ".", ".."} & {*str(names[key] or "").split("/")}:
            raise InputError(f"names.{key}={names[key]}: no name for a folder below runs/")
    return Path("runs") / names.dataset / f"{kind or names.method}-{names.backbone}-{fingerprint(keys)}-s{config.seed}"
