"""Writes images as a Hugging Face dataset on disk: whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sslctl import signals
from sslctl.data.packed_folder import PACK
from sslctl.data.source import Source
from sslctl.errors import InputError
from sslctl.runs.atomic import sync
from sslctl.runs.checksums import digest_of_file

_BATCH, _BATCH_BYTES = 1024, 16 * 2**20  # rows of one record batch, and bytes of its images, at most


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out` to write to, which takes its place when the block ends, and goes when that raises.

    What earlier, killed commands have left beside it goes first. Raises InputError where there is something at `out`.
    """
    if out.exists():
        raise InputError(f"out={out}: there is something already: move it away, or name another")
    for left in out.parent.glob(f".{out.name}.*.packing"):
        if not _is_alive(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.packing")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_alive(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def write_pack(folder: Path, sources: dict[str, Source], progress: Callable[[int], None]) -> None:
    """Writes splits as datasets.DatasetDict.load_from_disk reads them, with the hashes of their files in sslctl-pack.json.

    Images that are files keep their bytes; those in memory are arrays (C, H, W) of their type. progress: told how many are done.
    """
    pack, done = {"format": 1, "name": next(iter(sources.values())).name, "splits": {}}, 0
    for split, source in sources.items():
        (folder / split).mkdir()
        data = folder / split / "data-00000-of-00001.arrow"
        done = _write_split(data, source, done, progress)
        sync(data)
        _write_json(folder / split / "dataset_info.json", {"features": _features(source).to_dict()})
        # Sizes are compared at every opening, hashes where dataset.verify asks.
        own = {f"{split}/{data.name}": [data.stat().st_size, digest_of_file(data)]}
        # What datasets.load_from_disk looks for, so that the pack opens without sslctl too.
        state = {
            "_data_files": [{"filename": data.name}],
            "_fingerprint": own[f"{split}/{data.name}"][1][:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        _write_json(folder / split / "state.json", state)
        pack["splits"][split] = {"images": len(source), "files": own}
    _write_json(folder / "dataset_dict.json", {"splits": list(sources)})
    # Last: a folder without it is no whole pack.
    _write_json(folder / PACK, pack)


def _write_split(path: Path, source: Source, done: int, progress: Callable[[int], None]) -> int:
    from datasets.arrow_writer import ArrowWriter

    pending = 0
    with ArrowWriter(path=str(path), features=_features(source), writer_batch_size=_BATCH) as writer:
        for row in range(len(source)):
            if row % 256 == 0:
                signals.check()
                progress(done + row)
            cells = _cells(source, row)
            writer.write(cells)
            pending += len(cells["image"]["bytes"]) if source.paths else cells["image"].nbytes
            if pending >= _BATCH_BYTES:
                writer.write_examples_on_file()
                pending = 0
        writer.finalize()
    return done + len(source)


def _features(source: Source) -> Any:
    """Returns the columns of a source and their types."""
    import datasets

    columns = {}
    if source.paths:
        columns["image"] = datasets.Image()
    else:
        example = source.read(0)
        columns["image"] = datasets.Array3D(tuple(example.shape), str(example.dtype).removeprefix("torch."))
    if source.classes:
        label = datasets.ClassLabel(names=list(source.classes))
        columns["label"] = label if source.targets is None else datasets.Sequence(label)
    if source.groups is not None:
        columns["group"] = datasets.Value("int64")
    return datasets.Features(columns)


def _cells(source: Source, row: int) -> dict[str, Any]:
    if source.paths:
        path = Path(source.paths[row])
        cells: dict[str, Any] = {"image": {"bytes": path.read_bytes(), "path": path.name}}
    else:
        cells = {"image": source.read(row).numpy()}
    if source.classes:
        own = source.targets
        cells["label"] = int(source.labels[row]) if own is None else own[row].nonzero()[:, 0].tolist()
    if source.groups is not None:
        cells["group"] = int(source.groups[row])
    return cells


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
    sync(path)
