"""What a run leaves, as scripts/kill_campaign compares it: tensors, lines, TensorBoard's points, results, files."""

import json
import logging
import os
from pathlib import Path

from tests.runs import differences, metrics, tensors


def traces(folder: Path) -> dict:
    """What is compared of a finished run: everything that it left, by kind."""
    run = folder / "run"
    files = {str(path.relative_to(run)) for path in run.rglob("*")}
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return {
        "tensors": tensors(run),
        "metrics.jsonl": metrics(run),
        "TensorBoard": points(run),
        "results.jsonl": [(r["subject"], r["protocol"], r["metric"], r["value"], r["weights_sha256"]) for r in results],
        "files": sorted(file for file in files if not file.startswith("events.")),
        "temporary folder": sorted(os.listdir(folder / "tmp")),
    }


def points(run: Path) -> dict[str, list]:
    """tag -> (step, value) of each point that TensorBoard shows, of pictures (step, None); no times and speeds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # which says when it forgets what a resumed run repeats
    loaded = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    loaded.Reload()
    tags = loaded.Tags()
    scalars = [tag for tag in tags["scalars"] if not tag.startswith("time_") and tag != "images_per_second"]
    shown = {tag: [(event.step, event.value) for event in loaded.Scalars(tag)] for tag in scalars}
    return shown | {tag: [(event.step, None) for event in loaded.Images(tag)] for tag in tags["images"]}


def compare(left: dict, expected: dict) -> list[str]:
    """In what the traces of two runs differ, in words."""
    names = differences(left["tensors"], expected["tensors"])
    wrong = [f"{len(names)} tensors differ, first {names[0]}"] if names else []
    kinds = [kind for kind in expected if kind != "tensors" and left[kind] != expected[kind]]
    return wrong + [f"{kind} differ: {_first_difference(left[kind], expected[kind])}" for kind in kinds]


def _first_difference(actual, expected) -> str:
    """In what two lists or dictionaries differ first."""
    if isinstance(actual, dict):
        key = next(k for k in sorted({**actual, **expected}) if actual.get(k) != expected.get(k))
        return f"{key}: {_first_difference(actual.get(key, []), expected.get(key, []))}"
    extra = [item for item in actual if item not in expected][:3]
    missing = [item for item in expected if item not in actual][:3]
    return f"more {extra}, less {missing}, {len(actual)} for {len(expected)}"
