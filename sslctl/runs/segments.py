"""The segments of a run: from which step on it was trained under other versions, or on other images, than it began with."""

from pathlib import Path
from typing import Any

from sslctl.runs.directory import now, versions
from sslctl.runs.file_list import Changes, FileList
from sslctl.runs.ownership import step_of, steps_on_disk

_DECIDING = ("torch", "torchvision", "timm", "numpy")  # versions that may change a bit


def current_hashes(environment: dict[str, Any]) -> dict[str, str]:
    """Returns the hashes of what a run reads, as of its latest segment. Those that it began with make its name."""
    changed = [segment["data"]["to"] for segment in environment.get("segments", []) if "data" in segment]
    return environment.get("hashes", {}) | ({"data": changed[-1]} if changed else {})


def data_changes(environment: dict[str, Any]) -> str | None:
    """Says at which steps a run went on with other images, 'step 120: 2 added, 1 removed'; None where it never did."""
    changed = [segment for segment in environment.get("segments", []) if "data" in segment]
    return "; ".join(f"step {segment['step']:,}: {segment['data']['changes']}" for segment in changed) or None


def next_segment(
    run_dir: Path, environment: dict[str, Any], hashes: dict[str, str], files: FileList | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the segment that begins when a run goes on now, None where it is the latest one still; and what is said of it."""
    saved, before = steps_on_disk(run_dir), current_hashes(environment)
    segment = {"step": step_of(saved[0]) if saved else 0, "time": now(), "versions": versions()}
    earlier = (environment.get("segments") or [environment])[-1]["versions"]
    others = [name for name in _DECIDING if earlier.get(name) != segment["versions"][name]]
    sentences = []
    if others:
        changes = ", ".join(f"{name} {earlier.get(name)} → {segment['versions'][name]}" for name in others)
        sentences.append(
            f"goes on under other versions ({changes}): equal to an uninterrupted run to rounding, not bitwise"
        )
    if before.get("data") != hashes.get("data"):
        older = FileList.read(run_dir)
        changes = Changes.between(older, files).summary() if older and files else "other content"
        segment["data"] = {"from": before.get("data"), "to": hashes.get("data"), "changes": changes}
        sentences.append(f"goes on with other images ({changes}): not exact any more, which every result says")
    return (segment, sentences) if sentences else (None, [])
