"""Which columns of a Hugging Face dataset are images, labels and groups, and what the labels are."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslctl.data.table import NAMES
from sslctl.errors import InputError, nearest


def columns_of(features: Any, base: Path, setting: dict[str, str | None] | None) -> dict[str, str | None]:
    """Returns which column is the image, the label and the group."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    roles = ("image", "label", "group")
    for role, name in (setting or {}).items():
        if role not in roles:
            raise InputError(f"dataset.columns.{role}: expected {', '.join(roles)}{nearest(role, roles)}")
        if name is not None and name not in kinds:
            raise InputError(f"dataset.columns.{role}={name}: {base} has {', '.join(kinds)}{nearest(name, kinds)}")
    image = next((name for name, kind in kinds.items() if kind in ("Image", "Array3D")), None)
    by_name = {name.lower(): name for name in reversed(kinds)}
    chosen = {"image": image} | {
        role: next((by_name[name] for name in NAMES[role] if name in by_name), None) for role in ("label", "group")
    }
    chosen |= setting or {}
    if chosen["image"] is None or kinds[chosen["image"]] not in ("Image", "Array3D"):
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(f"{base} has no column of images: {columns}; cast one to datasets.Image")
    return chosen


def labels_of(data: Any, table: Any, column: str | None, base: Path) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """Returns labels (N,), targets (N, C) where an image may have several, and classes."""
    count = len(data)
    if column is None:
        return torch.full((count,), -1), None, ()
    feature, cells = data.features[column], table[:][column]
    inner = getattr(feature, "feature", None)
    if inner is not None:
        several = cells.to_pylist()
        names = tuple(getattr(inner, "names", None) or sorted({str(v) for row in several for v in row}))
        number = {name: i for i, name in enumerate(names)}
        targets = torch.zeros(count, len(names), dtype=torch.bool)
        for row, own in enumerate(several):
            targets[row, [v if isinstance(v, int) and hasattr(inner, "names") else number[str(v)] for v in own]] = True
        return torch.full((count,), -1), targets, names
    if getattr(feature, "names", None):
        own = cells.fill_null(-1).to_numpy() if cells.null_count else cells.to_numpy()
        return torch.from_numpy(own.astype(np.int64)), None, tuple(feature.names)
    texts = ["" if value is None else str(value) for value in cells.to_pylist()]
    if len(set(texts)) > max(1000, count // 2):
        raise InputError(
            f"{base}: column {column} has {len(set(texts)):,} values, is no label: dataset.columns={{label: null}}"
        )
    names = tuple(sorted({text for text in texts if text}))
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number.get(text, -1) for text in texts]), None, names
