"""The ranges of keys that neither a schema nor a table has: by the last part of their names, which mean the same everywhere."""

import re
from typing import Any

from omegaconf import OmegaConf

from sslctl.config.keys import KeyFacts
from sslctl.config.kinds import is_number

_AT_LEAST_1 = KeyFacts(low=1)  # sizes and counts
_NOT_NEGATIVE = KeyFacts(low=0)  # weights of terms, durations, and sizes of what may be left out
_POSITIVE = KeyFacts(above=0)
_SHARE = KeyFacts(low=0, high=1)  # and probabilities, momenta

RANGES = {
    r"(.*_)?temperature(_start)?": _POSITIVE,
    r"(.*_)?momentum(_end)?|rho|alpha|betas": _SHARE,
    r".*_(ratio|chance)|mask_ratio_(low|high)|dropout|colour_drop|gap|overlap|jitter|hidden|rebalance|label_smoothing": _SHARE,
    r"gram_(teacher_from|start|ramp|refresh)": _SHARE,
    r"colour_resolution|resolution": KeyFacts(above=0, high=1),
    r".*_view_scale": KeyFacts(above=0, high=1),
    r".*_epochs|skip|stem_stride|queue_size|memory_size|gram_refreshes": _NOT_NEGATIVE,
    r"(.*_)?(weight|weights|beta|covariance|variance|invariance|adversarial|lambda_|noise_std)": _NOT_NEGATIVE,
    r"epsilon|annealing|clip_grad|scale|sigma|likelihood_std|initial_std|momentum_stretch|trust|layer_decay": _POSITIVE,
    r".*lr|.*lr_scale|(tiled|paired)_view": _POSITIVE,
    r"(.*_)?(dim|size|layers|blocks|depth|heads|views|grid|iterations|prototypes|targets|epochs)": _AT_LEAST_1,
    r"widths": KeyFacts(low=1, filled=True),
    r"draws|directions|permutations|reach|slices|batchnorm_groups|frames|window_frames|length|vocabulary": _AT_LEAST_1,
}
_NODES = ("method", "backbone", "optimizer", "dataset", "eval_dataset")
_CLASSES = ("sslctl.", "torch.")  # of somebody else's, names may mean something else


def range_of(name: str) -> KeyFacts | None:
    """Returns the range of a key by the last part of its name, None for one that has none."""
    return next((facts for pattern, facts in RANGES.items() if re.fullmatch(pattern, name)), None)


def keys_with_ranges(config: Any) -> list[tuple[str, Any, KeyFacts]]:
    """Returns (path, value, range) of the keys that a configuration's nodes of sslctl's own classes and torch's have."""
    keys = []
    for name in _NODES:
        node = config.get(name)
        if node and str(node.get("_target_", "")).startswith(_CLASSES):
            keys += [
                (f"{name}.{key}", node[key], facts) for key in node if (facts := range_of(key)) and _counts(node[key])
            ]
    return keys


def _counts(value: Any) -> bool:
    return is_number(value) or OmegaConf.is_list(value)
