"""From a run directory to its configuration, data and method."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sslctl.config.command_line import task_words
from sslctl.config.literal import as_config, escaped
from sslctl.data.sources import Source
from sslctl.errors import InputError, say, user_path
from sslctl.factory.from_config import adapt_backbone, build_backbone, build_method, build_views
from sslctl.factory.teacher import load_teacher
from sslctl.methods.base import Facts, Method
from sslctl.models.lora import merge_
from sslctl.models.preprocess import Preprocess, TextPreprocess, preprocess_from
from sslctl.models.weights import file_metadata, refuse_non_finite
from sslctl.ops.image_size import image_size_of
from sslctl.runs import checkpoint
from sslctl.runs.description import advice_on_lost
from sslctl.runs.directory import GIVEN, TEACHER, TOKENIZER, find_runs, is_run, run_named_by
from sslctl.runs.manifest import MANIFEST
from sslctl.runs.ownership import LAST
from sslctl.runs.reading import read_config, read_environment, read_preprocess, repair_command
from sslctl.runs.repair import damages
from sslctl.views import ViewMaker


def resolve_runs(ckpt: Any, left_out: list[str] | None = None) -> list[tuple[Path, Path]]:
    """Returns (run, checkpoint) for every run that ckpt= names: runs, checkpoints of runs, or directories searched for runs.

    Of a directory, runs without a checkpoint, and damaged ones, are left out and named; one that ckpt= names itself is
    refused. left_out: takes their sentences; with it runs that are named themselves are left out, too, unless all are.
    """
    resolved, reasons, refusals = [], [], []
    for name in [ckpt] if isinstance(ckpt, str) else list(ckpt or []):
        path = user_path(name)
        if path.name == LAST and (run_named_by(path.parent) or is_run(path.parent)):
            path = path.parent  # whatever `last` is: the run's newest checkpoint
        path = run_named_by(path) or path
        if not path.exists():
            raise InputError(f"ckpt={path}: no such run")
        if path.is_file():
            raise InputError(
                f"ckpt={path} is a file, not a run directory; weights from elsewhere are evaluated with"
                " backbone=… backbone.weights=FILE"
            )
        if path.name.startswith("step-") and (path / MANIFEST).exists():
            runs, checkpoint_of = [path.resolve().parents[1]], lambda _, path=path: _verified(path)
        else:
            runs, checkpoint_of = find_runs(path), checkpoint.newest_valid
        if not runs:
            raise InputError(f"ckpt={path}: no run directory there (no config.yaml with environment.json)")
        usable, refused = [], []
        for run in runs:
            damaged, lost = damages(run), advice_on_lost(run)
            if lost:
                what = damaged[0].describe() if damaged else str(run)
                refused.append((f"{what}; {lost}", InputError(f"{what}; {lost}", advice=[repair_command(run)])))
            elif damaged:
                refused.append((damaged[0].describe(), damaged[0]))
            elif (newest := checkpoint_of(run)) is None:
                sentence = f"ckpt={run}: this run has no valid checkpoint yet"
                refused.append((f"{run} has no valid checkpoint yet", InputError(sentence)))
            else:
                usable.append((run, newest))
        if not usable and left_out is None:
            raise InputError(*(message for _, error in refused for message in error.messages))
        resolved += usable
        reasons += [sentence for sentence, _ in refused]
        refusals += [error for _, error in refused]
    if refusals and not resolved:
        raise InputError(*(message for error in refusals for message in error.messages))
    for reason in reasons:
        say(f"left out: {reason}")
    if left_out is not None:
        left_out += reasons
    return resolved


def _verified(path: Path) -> Path:
    checkpoint.verify(path)
    return path


def as_in_run(node: Any, run: Path, key: str = "dataset", command: str | None = None) -> Any:
    """Returns a dataset's configuration that reads samples as a run does, where it does not say itself: by the run's tokenizer,
    in its size, channels and range of values. key: where the command has it; command: a recorded one, else the running one."""
    tokenizer = run / TOKENIZER
    if "tokenizer" in node and not node.tokenizer and tokenizer.exists():
        return OmegaConf.merge(node, {"tokenizer": escaped(str(tokenizer))})
    words = task_words() if command is None else command.split()
    return with_preprocess(node, run_preprocess(run), key, words)


def as_in_weights(node: Any, weights: str | None, key: str = "dataset") -> Any:
    """Returns a dataset's configuration that reads samples as weights from elsewhere expect them, where these are a run's, or a
    file's that says so."""
    path = user_path(weights) if weights else None
    if path and is_run(path):
        return as_in_run(node, path, key)
    saved = file_metadata(path).get("preprocess") if path and path.is_file() else None
    return with_preprocess(node, preprocess_from(json.loads(saved)), key) if saved else node


def with_preprocess(
    node: Any, preprocess: Preprocess | TextPreprocess, key: str = "dataset", words: list[str] | None = None
) -> Any:
    """Returns a dataset's configuration with the size, channels and range of values, or length, that a backbone was trained with.

    What it names itself, or the command does at this key, stays. words: of the command; None: of the running one.
    """
    values = {"range": "value_range", "image_size": "image_size", "channels": "channels", "length": "length"}
    of_run = {name: getattr(preprocess, attribute, None) for name, attribute in values.items()}
    named = {word.partition("=")[0] for word in (task_words() if words is None else words)}
    unnamed = {
        name: value
        for name, value in of_run.items()
        if value is not None
        and name in node
        and f"{key}.{name}" not in named
        and (node[name] is None or name != "range")
    }
    return OmegaConf.merge(node, unnamed)


def dataset_of(run: Path, key: str = "dataset") -> Any:
    """Returns a dataset's configuration of a run. Its root is where the run had it; of data that have moved, where it was typed,
    seen from here. Earlier versions kept relative roots: those are where the run was started."""
    config = read_config(run)
    node = as_config(config[key])
    if root := node.get("root"):
        typed = config.get("as_typed", {}).get(f"{key}.root", root)
        places = (Path(read_environment(run)["cwd"]) / user_path(root), user_path(typed))
        node.root = escaped(str(next((place for place in places if place.exists()), user_path(root))))
    return as_in_run(node, run, key, read_environment(run)["command"])


def run_preprocess(run: Path) -> Preprocess | TextPreprocess:
    """Reads what a run's backbone expects of a sample."""
    return preprocess_from(read_preprocess(run))


@dataclass(frozen=True)
class TrainedRun:
    """A run at one of its checkpoints."""

    config: Any
    preprocess: Preprocess | TextPreprocess
    method: Method
    step: int


def open_run(run: Path, path: Path, backbone_node: Any | None = None) -> TrainedRun:
    """Opens a run at a checkpoint, every tensor of which must match. backbone_node: another backbone than the run's.

    What LoRA has learned is merged. Raises CheckpointError where a parameter holds values that are not finite.
    """
    method, config = load_method(run, backbone_node), as_config(read_config(run))
    adapt_backbone(method, config.backbone)
    untrained = {name: p.detach().clone() for name, p in method.named_parameters()}
    step = checkpoint.load(path, method)["step"]
    refuse_non_finite(path / checkpoint.WEIGHTS, dict(method.named_parameters()), untrained)
    merge_(method)
    return TrainedRun(config, run_preprocess(run), method, step)


def load_method(run: Path, backbone_node: Any | None = None, *, given: bool = False) -> Method:
    """Builds the method of a run as its configuration says, untrained. backbone_node: another backbone than the run's.

    given: with the weights that its backbone began with. Raises CheckpointError where they are of another one.
    """
    config = as_config(read_config(run))
    torch.manual_seed(config.seed)
    facts = read_environment(run)["facts"]
    facts = Facts(**facts | {"image_size": image_size_of(facts["image_size"])})
    preprocess = run_preprocess(run)
    backbone = build_backbone(backbone_node or config.backbone, preprocess, with_weights=False)
    if given:
        tensors = checkpoint.load_tensors(run / GIVEN)
        if differences := checkpoint.compare(tensors, backbone.state_dict()):
            raise checkpoint.CheckpointError(f"{run / GIVEN} is of another backbone:", *differences)
        backbone.load_state_dict(tensors)
        backbone.pretrained = frozenset(tensors)
    teacher = load_teacher(str(run / TEACHER), None, preprocess) if "teacher" in config.method else None
    method = build_method(config.method, backbone, facts, teacher)
    method.judged = config.get("network")
    return method


def views_of(settings: Any, source: Source, method: Method) -> ViewMaker:
    """Builds what makes the views of a run, as its configuration says."""
    return build_views(settings, source, method.backbone.network)
