"""The folder of a Hugging Face dataset or of a pack: its splits, whether it is whole, how many images it has.

Nothing here imports torch.
"""

import json
from pathlib import Path

from sslctl.data.layout import NoTestSplit, split_kind
from sslctl.errors import InputError, first_line, nearest
from sslctl.runs.checksums import digest_of_file

PACK = "sslctl-pack.json"  # beside the splits of a pack: what was written, to be compared with what is there


def refuse_others(base: Path) -> None:
    """Raises InputError for a folder of something else, above all of tar shards."""
    if (base / "dataset_dict.json").exists() or (base / "state.json").exists():
        return
    shards = sorted(file.name for pattern in ("*.tar", "*.tar.gz", "*.tgz") for file in base.glob(pattern))
    if shards:
        raise InputError(
            f"{base} holds {len(shards):,} tar files ({shards[0]}, …), which cannot be read image by image: unpack them into"
            " a folder, then `sslctl pack dataset=folder dataset.root=FOLDER out=PACK` writes what dataset=hf reads"
        )
    if (base / PACK).exists() or next(base.glob("*.arrow"), None):
        raise InputError(f"{base} is a damaged pack: dataset_dict.json is missing")
    raise InputError(
        f"{base} was not written by save_to_disk of Hugging Face datasets, nor by sslctl pack: it has neither"
        " dataset_dict.json nor state.json"
    )


def split_folder(base: Path, split: str, splits: dict[str, str] | None) -> tuple[Path, str]:
    """Returns where a split lies, and the plan's words for it."""
    if (base / "state.json").exists():  # one Dataset
        if split == "test":
            raise NoTestSplit(f"{base} is one split alone: eval_dataset=… names labelled images to judge by")
        return base, f"all of {base}"
    try:
        names = json.loads((base / "dataset_dict.json").read_text())["splits"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{base}/dataset_dict.json is damaged: {first_line(error)}") from error
    if splits:
        other = next((kind for kind in splits if kind not in ("train", "test")), None)
        if other is not None or "train" not in splits:
            raise InputError(f"dataset.splits={splits}: expected {{train: SPLIT, test: SPLIT}}")
        unknown = next((name for name in splits.values() if name not in names), None)
        if unknown is not None:
            raise InputError(
                f"dataset.splits: {base} has no {unknown}; there are {', '.join(names)}{nearest(unknown, names)}"
            )
        chosen = splits.get(split)
    else:
        of_kind = {split_kind(name): name for name in reversed(names)}
        chosen = of_kind.get(split) or (
            of_kind.get("val") if split == "test" else names[0] if len(names) == 1 else None
        )
    if chosen is None:
        raise NoTestSplit(
            f"{base} has no {split} split among {', '.join(names)}: dataset.splits={{train: SPLIT, test: SPLIT}}"
        )
    return base / chosen, f"split {chosen} of {base}"


def read_pack(base: Path, verify: bool) -> dict | None:
    """Returns what a pack says of itself, None where another program wrote it. Raises InputError where it is not whole."""
    if not (base / PACK).exists():
        if verify:
            raise InputError(f"dataset.verify=true: {base} has no hashes, sslctl pack did not write it")
        return None
    try:
        pack = json.loads((base / PACK).read_text())
        written = {name: facts for own in pack["splits"].values() for name, facts in own["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{base} is a damaged pack: {PACK} cannot be read") from error
    for name, (size, digest) in written.items():
        path = base / name
        if not path.exists() or path.stat().st_size != size:
            there = f"has {path.stat().st_size:,} bytes" if path.exists() else "is missing"
            raise InputError(f"{base} is a damaged pack: {name} {there}, {size:,} were written")
        if verify and digest_of_file(path) != digest:
            raise InputError(f"{base} is a damaged pack: {name} does not hold what was written (its hash differs)")
    return pack


def state_of(folder: Path) -> list:
    """Returns what tells a foreign dataset's content: its fingerprint, its files and their sizes."""
    state = json.loads((folder / "state.json").read_text())
    return [
        state.get("_fingerprint"),
        [[f["filename"], (folder / f["filename"]).stat().st_size] for f in state["_data_files"]],
    ]


def count_images(base: Path, splits: dict[str, str] | None) -> int | None:
    """Returns the number of training images, where a file of the folder says it. Raises InputError as opening it would."""
    refuse_others(base)
    folder, _ = split_folder(base, "train", splits)
    pack = read_pack(base, verify=False)
    if pack:
        return pack["splits"][folder.name]["images"]
    try:
        counts = json.loads((folder / "dataset_info.json").read_text())["splits"]
        return sum(int(split["num_examples"]) for split in counts.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
