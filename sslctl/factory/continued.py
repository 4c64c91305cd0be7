"""A run that goes on although files were repaired or removed, and a new run that begins with all that another has learned."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.data.unreadable import next_readable, refuse_too_many
from sslctl.errors import InputError
from sslctl.factory.from_config import build_source
from sslctl.factory.from_run import run_preprocess, with_preprocess
from sslctl.methods.base import Method
from sslctl.models.preprocess import Preprocess, TextPreprocess
from sslctl.runs import checkpoint
from sslctl.runs.continuing import named_run
from sslctl.runs.directory import is_run
from sslctl.runs.file_list import Changes, FileList
from sslctl.runs.manifest import STATE, WEIGHTS, CheckpointError, read_manifest
from sslctl.runs.plain import from_plain
from sslctl.runs.reading import read_environment
from sslctl.runs.segments import current_hashes

# --- The same run ---


def same_run(candidates: list[Path], node: Any, source: Source) -> tuple[Path, Source, Preprocess] | None:
    """Returns the first run that goes on although files that it could not read are repaired, or files are removed that others
    stand in for (dataset.on_error=skip); with its images, numbered as they were, and what it makes of them.

    None where nothing of that kind has happened, or more has: then a run is refused, or goes on with other images.
    node: the dataset's configuration; source: what it gives now.
    """
    for run in candidates:
        earlier = FileList.read(run) if is_run(run) and source.file_list and source.file_list.are_rows else None
        if earlier is None or earlier == source.file_list:
            continue
        changes = Changes.between(earlier, source.file_list)
        loses_files = changes.removed and node.get("on_error") != "skip" and not node.get("skip")
        if not (changes.added or changes.changed or loses_files):
            preprocess = run_preprocess(run)  # its range and size, which a file that is gone may have decided
            now = build_source(with_preprocess(node, preprocess), "train")
            return run, _numbered_as_before(now, run, earlier, changes, node.get("max_bad")), preprocess
    return None


def _numbered_as_before(now: Source, run: Path, earlier: FileList, changes: Changes, max_bad: float) -> Source:
    """Returns the images that are there in the rows that a run knows them by. earlier: its files."""
    row_of = {name: row for row, name in enumerate(now.file_list.names)}
    removed, unread = set(changes.removed), {now.file_list.names[row] for row in now.file_list.unreadable}
    bad = [row for row, name in enumerate(earlier.names) if name in unread | removed]
    refuse_too_many(earlier.names, bad, max_bad, run)
    stand_ins = next_readable(len(earlier.names), bad)
    rows = [row_of[earlier.names[stand_ins.get(row, row)]] for row in range(len(earlier.names))]
    warnings = [f"since the run began {line}" for line in changes.lines()]
    return replace(
        now.subset(torch.tensor(rows)),
        original_rows=(),
        content_hash=current_hashes(read_environment(run))["data"],
        file_list=earlier,
        description=replace(now.description, warnings=(*now.description.warnings, *warnings)),
    )


# --- A new run from another ---


@dataclass(frozen=True)
class ContinuedRun:
    """A run from whose newest checkpoint another one begins. digest: of its weights there."""

    run: Path
    checkpoint: Path
    digest: str

    @classmethod
    def named(cls, word: Any) -> "ContinuedRun":
        """Finds the newest checkpoint of the run that continue_run= names. Raises InputError where there is none."""
        run = named_run(word)
        newest = checkpoint.newest_valid(run)
        if newest is None:
            raise InputError(
                f"continue_run={run}: it has no valid checkpoint; backbone.weights={run} begins with its backbone alone",
                advice=[f"continue_run=null backbone.weights={run}"],
            )
        return cls(run, newest, read_manifest(newest)["files"][WEIGHTS]["sha256"])

    def normalized(self, preprocess: Preprocess | TextPreprocess) -> Preprocess | TextPreprocess:
        """Returns what the backbone gets to see, normalised as before: its mean and std are among the tensors taken over."""
        its = run_preprocess(self.run)
        if not isinstance(its, Preprocess) or not isinstance(preprocess, Preprocess):
            return preprocess
        return replace(preprocess, mean=its.mean, std=its.std)

    def load(self, method: Method) -> str:
        """Copies all tensors into a method, but those with an entry for each image where there are others now; says what it did.

        Raises CheckpointError for a method of another kind or size.
        """
        theirs, ours = checkpoint.load_tensors(self.checkpoint / WEIGHTS), method.state_dict()
        before = read_environment(self.run)["facts"]["num_images"]
        per_image = [
            name
            for name, tensor in theirs.items()
            if name in ours and _differ_by_images(tensor, ours[name], before, method.facts.num_images)
        ]
        differences = checkpoint.compare(
            {k: v for k, v in theirs.items() if k not in per_image}, _without(ours, per_image)
        )
        if differences:
            raise CheckpointError(
                f"continue_run={self.run} has learned another model:",
                *differences,
                f"with other sizes or another method, backbone.weights={self.run} begins with its backbone alone",
                advice=[f"continue_run=null backbone.weights={self.run}"],
            )
        method.load_state_dict({**ours, **{k: v for k, v in theirs.items() if k not in per_image}}, strict=True)
        anew = f"; {', '.join(per_image)} begin anew, with an entry an image" if per_image else ""
        return f"{self.run} at {self.checkpoint.name}: {len(theirs) - len(per_image)} tensors{anew}; schedules begin at step 0"

    def optimizer_state(self) -> dict[str, Any]:
        """Reads the state that the other run's optimizer had."""
        return from_plain(checkpoint.load_pickle(self.checkpoint / STATE))["optimizer"]


def _without(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _differ_by_images(theirs: Tensor, ours: Tensor, before: int, now: int) -> bool:
    """Tells whether two tensors have another shape only where one has an entry for each of the earlier images, one of these."""
    pairs = list(zip(theirs.shape, ours.shape, strict=False))
    return (
        theirs.dim() == ours.dim()
        and theirs.shape != ours.shape
        and all(a == b or (a, b) == (before, now) for a, b in pairs)
    )
