"""Manifests: what a checkpoint consists of, with sizes and SHA-256, and of which run it is.

Format 2 holds the contents of the run's config.yaml (with the seed) and environment.json (with the hashes of its data), so
that these can be written again, and a hash of itself. Format 1, and manifests from before formats had numbers, hold step and
files alone.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from sslctl.errors import InputError
from sslctl.ops.special_files import refuse_special
from sslctl.runs.checksums import digest_of_file

FORMAT, FORMATS = 2, (1, 2)  # that is written, that are read
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"
_NO_MANIFEST = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)  # what reading another file raises


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged or of something else. Names the path."""


def write_manifest(folder: Path, step: int, run: dict[str, Any] | None) -> None:
    """Writes the manifest of the files in a folder. run: {"config", "environment"}, None of a trained classifier's."""
    content = {"format": FORMAT, "step": step, "files": {name: _digest(folder / name) for name in (WEIGHTS, STATE)}}
    content |= {"run": json.loads(json.dumps(run))} if run else {}  # as it is read again
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256": _own_digest(content)}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint. Raises CheckpointError for one that is not as it was written, or of another format."""
    path = folder / MANIFEST
    try:
        refuse_special(path)
        manifest = json.loads(path.read_text())
        format_ = manifest.get("format", 1)
        intact = format_ == 1 or manifest.pop("sha256") == _own_digest(manifest)
        manifest["files"] = dict(manifest["files"])
    except _NO_MANIFEST as error:
        raise CheckpointError(f"{path} ({size_of(path)} bytes) cannot be read: {error}") from error
    if format_ not in FORMATS:
        raise CheckpointError(f"{path} is of format {format_}; this version of sslctl reads {FORMATS[0]} to {FORMAT}")
    if not intact:
        raise CheckpointError(f"{path} ({size_of(path)} bytes) is not what was written there")
    return manifest


def names_run(folder: Path) -> bool:
    """Tells whether the manifest of a checkpoint says of which run it is."""
    try:
        return bool(read_manifest(folder).get("run"))
    except CheckpointError:
        return False


def verify(folder: Path) -> None:
    """Raises CheckpointError unless every file of the manifest is there with its size and SHA-256."""
    files = read_manifest(folder)["files"]
    for name in (WEIGHTS, STATE):
        expected, file = files.get(name), folder / name
        if not file.is_file() or _digest(file) != expected:
            raise CheckpointError(f"{file} ({size_of(file)} bytes) is not what was written there")


def describes(folder: Path, step: int | None = None) -> bool:
    """Tells whether a folder has a manifest of sslctl's, of a step if one is named, whatever has become of the files it lists."""
    try:
        refuse_special(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        return (
            manifest.get("format", 1) in FORMATS
            and manifest["step"] == (manifest["step"] if step is None else step)
            and files.keys() == {WEIGHTS, STATE}
            and all(len(entry["sha256"]) == 64 and entry["bytes"] >= 0 for entry in files.values())
        )
    except _NO_MANIFEST:
        return False


def size_of(path: Path) -> int:
    """Returns the bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": digest_of_file(path)}


def _own_digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest without its own."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
