"""The state of every global generator: dropout, drop path and whatever a user's method draws come from them."""

import random
from typing import Any

import numpy as np
import torch

GENERATORS = ("torch", "cuda", "numpy", "python")


def seed_generators(seed: int) -> None:
    """Seeds them all, so that a run draws what its seed says."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def generator_states() -> dict[str, Any]:
    """Returns the states of `GENERATORS`, as plain types."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Undoes everything drawn since `generator_states()`. Called last, immediately before the next batch."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
