"""Checkpoints: written so that a kill at any instant leaves a valid one, read only when every byte is as written.

A checkpoint is a directory checkpoints/step-N with weights.safetensors, state.pt (plain types and tensors) and
manifest.json (of which run it is, sizes and SHA-256). It is written under a temporary name, synced, and renamed.
"""

import contextlib
import io
import json
import os
import pickle
import re
import struct
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from sslctl.errors import say
from sslctl.ops.special_files import refuse_special
from sslctl.runs.atomic import sync
from sslctl.runs.checksums import KEY, WrongChecksum, check_tensors, sign_tensors
from sslctl.runs.generators import GENERATORS
from sslctl.runs.manifest import STATE, WEIGHTS, CheckpointError, size_of, verify, write_manifest
from sslctl.runs.ownership import (
    CHECKPOINTS,
    clear_last,
    discard,
    is_checkpoint,
    remove,
    remove_leftovers,
    step_of,
    steps_on_disk,
    write_last,
)
from sslctl.runs.plain import from_plain, to_plain

_STATE_PARTS = ("step", "optimizer", "generators", "threads", "scaler", "skipped")


def warn(message: str) -> None:
    say(f"sslctl: warning: {message}", file=sys.stderr)


# --- Writing ---


def save(
    run_dir: Path,
    step: int,
    module: nn.Module,
    state: dict[str, Any],
    keep_last: int,
    run: dict[str, Any] | None = None,
) -> Path:
    """Writes checkpoints/step-N, its name to `last`, and only then removes all but the newest `keep_last` of sslctl's.

    state: "step", "optimizer" (a state_dict), "generators" (`generator_states()` of each process), "threads", "scaler" and
    "skipped" (of fp16). run: {"config", "environment"} for the manifest.
    """
    final = run_dir / CHECKPOINTS / f"step-{step}"
    temporary = final.with_name(f".step-{step}.writing")
    plain = to_plain(state, "the state")
    try:
        if os.path.lexists(final):
            try:
                verify(final)
                return final  # the same step again, after an evaluation was cut short
            except CheckpointError:
                remove(final)
        discard(temporary)
        temporary.mkdir(parents=True)
        save_tensors(temporary / WEIGHTS, module.state_dict())
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        (temporary / STATE).write_bytes(buffer.getbuffer())
        write_manifest(temporary, step, run)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(final)
        sync(final.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            discard(temporary)
        raise OSError(
            error.errno, f"checkpoint not written: {error.strerror}", str(error.filename or temporary)
        ) from error
    write_last(run_dir, final)
    own = [path for path in steps_on_disk(run_dir) if is_checkpoint(path)]
    later = [path for path in own if step_of(path) > step]  # damaged: the run resumed before them
    _remove_old([*_older(run_dir, step)[keep_last:], *later])
    return final


def _older(run_dir: Path, step: int) -> list[Path]:
    """Lists the checkpoints of sslctl's up to a step, newest first."""
    return [path for path in steps_on_disk(run_dir) if step_of(path) <= step and is_checkpoint(path)]


def _remove_old(paths: list[Path]) -> None:
    for path in paths:
        try:
            remove(path)
        except OSError as error:
            warn(f"old checkpoint {path} not removed: {error}")


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, *, signed: bool = False
) -> None:
    """Writes a safetensors file with each tensor contiguous and each storage once; its metadata list the aliases.

    signed: with its checksum, for a file that no manifest lists.
    """
    stored_as: dict[tuple, str] = {}
    stored, aliases = {}, {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        if tensor.numel() and place in stored_as:
            aliases[name] = stored_as[place]
        else:
            stored_as[place] = name
            stored[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    # Written by Python, not by the library: its own errors do not say what the system said.
    content = serialize(stored, metadata={**(metadata or {}), "aliases": json.dumps(aliases)})
    path.write_bytes(sign_tensors(content) if signed else content)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, with the aliases that `save_tensors` listed.

    Raises CheckpointError for other files, and where a file's checksum, if it has one, differs.
    """
    try:
        refuse_special(path)
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} ({size_of(path)} bytes) is not a safetensors file: {error}") from error
    about = metadata(path)
    try:
        if KEY in about:
            check_tensors(path)
        aliases = json.loads(about.get("aliases", "{}"))
        return tensors | {name: tensors[source] for name, source in aliases.items()}
    except WrongChecksum as error:
        raise CheckpointError(f"{path} ({size_of(path)} bytes) is {error}") from error
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} ({size_of(path)} bytes) lists tensors under a second name that it lacks"
        ) from error


def metadata(path: Path) -> dict[str, str]:
    """Reads what a safetensors file says of itself."""
    try:
        refuse_special(path)
        with safe_open(path, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} ({size_of(path)} bytes) is not a safetensors file: {error}") from error


# --- Reading ---


def newest_valid(run_dir: Path) -> Path | None:
    """Finds the newest checkpoint that verifies, with a warning for each that does not."""
    for path in steps_on_disk(run_dir):
        try:
            verify(path)
        except CheckpointError as error:
            warn(f"{error}; falling back to the checkpoint before it")
        else:
            return path
    return None


def continue_from(run_dir: Path, keep_last: int) -> Path | None:
    """Finds the checkpoint that a run goes on from, and does what a kill left undone of its saving: `last`, older ones removed.

    Only for the holder of the run's lock.
    """
    remove_leftovers(run_dir)
    newest = newest_valid(run_dir)
    if newest is not None:
        write_last(run_dir, newest)
        _remove_old(_older(run_dir, step_of(newest))[keep_last:])
    return newest


def remove_all(run_dir: Path) -> None:
    """Deletes a run's checkpoints, which its result needs no more."""
    clear_last(run_dir)
    remove_leftovers(run_dir)
    for path in steps_on_disk(run_dir):
        if is_checkpoint(path):
            remove(path)
    if not any((run_dir / CHECKPOINTS).iterdir()):
        (run_dir / CHECKPOINTS).rmdir()


def load(path: Path, module: nn.Module) -> dict[str, Any]:
    """Copies a verified checkpoint into existing tensors, strictly, and returns the rest of the state."""
    tensors = load_tensors(path / WEIGHTS)
    differences = compare(tensors, module.state_dict())
    if differences:
        raise CheckpointError(f"{path} is of another model:", *differences)
    module.load_state_dict(tensors, strict=True)
    try:
        state = from_plain(load_pickle(path / STATE))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path / STATE} holds a NumPy value that is none: {error}") from error
    missing = [part for part in _STATE_PARTS if part not in state]
    for process in state.get("generators", []):
        missing += [f"generators.{part}" for part in GENERATORS if part not in process]
    if missing:
        raise CheckpointError(
            f"{path / STATE} lacks {', '.join(missing)}: the run cannot continue exactly; to start a new one from its"
            " weights alone, say backbone.weights="
        )
    return state


# What torch's reader raises on files that are cut short, altered or full of objects: it has no exception of its own.
_DAMAGED = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError)
_DAMAGED += (AssertionError, struct.error)


def load_pickle(path: Path, stand_ins: Sequence[tuple[Any, str]] = ()) -> Any:
    """Reads a torch file of tensors and plain types. Anything that would run code is refused, by the name of its class.

    stand_ins: (class, name): what is read instead of the class of that name.
    """
    try:
        refuse_special(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(stand_ins)):
            warnings.simplefilter("ignore")  # about pickles, which are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        first = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0][:160]
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            first = f"it holds {name[1]}; where it may be run, save its tensors alone, as torch.save(model.state_dict(), FILE)"
        raise CheckpointError(
            f"{path} ({size_of(path)} bytes) is not a file of tensors and plain values, and nothing else is loaded: {first}"
        ) from error


def compare(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Describes each kind of difference between two sets of named tensors in a line; empty when all match."""
    lines = []
    for words, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            lines.append(
                f"  {len(names)} tensors {words}: {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}"
            )
    common = sorted(tensors.keys() & expected.keys())
    shapes = [(n, tuple(tensors[n].shape), tuple(expected[n].shape)) for n in common]
    types = [(n, tensors[n].dtype, expected[n].dtype) for n in common if not same_kind(tensors[n], expected[n])]
    for words, values in (("shape", [v for v in shapes if v[1] != v[2]]), ("type", types)):
        if values:
            examples = "; ".join(f"{name}: {ours} found, {theirs} expected" for name, ours, theirs in values[:3])
            lines.append(f"  {len(values)} tensors of another {words}: {examples}{' …' if len(values) > 3 else ''}")
    return lines


def same_kind(tensor: Tensor, expected: Tensor) -> bool:
    """Tells whether a tensor holds floating-point numbers where they are expected, of whatever precision."""
    return tensor.is_floating_point() or not expected.is_floating_point()
