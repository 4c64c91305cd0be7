"""Classifiers that evaluations keep in a run for `sslctl predict`: tensors and what they are of, a safetensors file each.

classifiers/KIND-KEY.safetensors: the key is that of the result, so that the same evaluation again replaces its own alone.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sslctl.config.command_line import shell_words
from sslctl.errors import InputError
from sslctl.runs.atomic import replacing
from sslctl.runs.checkpoint import CheckpointError, load_tensors, metadata, save_tensors
from sslctl.runs.directory import CLASSIFIERS
from sslctl.runs.manifest import size_of
from sslctl.runs.reading import run_word
from sslctl.runs.schema import misfit

FORMAT = 1
VERBS = {"linear": "linear-eval", "knn": "knn-eval", "finetune": "finetune"}  # kind -> the verb that keeps it
_ORDER = ("knn", "linear", "finetune")  # the later is taken, where several are kept
_NAME = re.compile(rf"({'|'.join(VERBS)})-[0-9a-f]{{16}}\.safetensors", re.ASCII)
_SETTINGS = {
    "linear": {},
    "knn": {"k": int, "temperature": float, "depth": int},
    "finetune": {"network": str, "pool": str, "directory": str, "sha256": str},
}
_IMAGES = {"dataset": str, "split": str, "content": str, "images": int}
_KEYS = {
    "kind": str,
    "time": str,
    "metric": str,
    "value": float,
    "judged_on": _IMAGES,
    "fitted_on": _IMAGES,
    "classes": list[str],
    "several": bool,
    "features": str,
    "weights_sha256": str,
    "step": int,
    "preprocess": dict,
    "resize": int | None,
    "bands": list[int] | None,
    "settings": dict,
}


@dataclass(frozen=True)
class Classifier:
    """What a kept classifier is of. Its tensors are read when it is chosen: `tensors()`.

    metric, value: what its evaluation reported of it, on the images of judged_on. several: whether an image may have several
    of the classes. features, weights_sha256, step: of the run's weights whose features it takes; a fine-tuned one has weights
    of its own. preprocess: as preprocess.json; resize: of the shorter side, as the judged images had it. bands: that were
    taken of files of more. settings: of its kind.
    """

    kind: str
    time: str
    metric: str
    value: float
    judged_on: dict[str, Any]
    fitted_on: dict[str, Any]
    classes: list[str]
    several: bool
    features: str
    weights_sha256: str
    step: int
    preprocess: dict[str, Any]
    resize: int | None
    bands: list[int] | None
    settings: dict[str, Any]
    path: Path = Path()

    @property
    def figure(self) -> str:
        """Returns what its evaluation reported, in words: top1 93.41%."""
        return f"{self.metric} {self.value:.2%}"

    def tensors(self) -> dict[str, Tensor]:
        """Reads its tensors. Raises CheckpointError where the file is not as it was written."""
        return load_tensors(self.path)


def write(run: Path, classifier: Classifier, key: str, tensors: dict[str, Tensor]) -> Path:
    """Writes a classifier into a run, whole or not at all, in the place of an earlier one of its kind and key."""
    path = path_of(run, classifier.kind, key)
    path.parent.mkdir(exist_ok=True)
    about = {name: value for name, value in asdict(classifier).items() if name != "path"}
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, {"classifier": json.dumps({"format": FORMAT, **about})}, signed=True)
    return path


def path_of(run: Path, kind: str, key: str) -> Path:
    return run / CLASSIFIERS / f"{kind}-{key}.safetensors"


def read(path: Path) -> Classifier:
    """Reads what a kept classifier is of. Raises CheckpointError for a file that is none."""
    try:
        about = json.loads(metadata(path)["classifier"])
        format_ = about.pop("format")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} ({size_of(path)} bytes) is no classifier that sslctl kept") from error
    if format_ != FORMAT:
        raise CheckpointError(f"{path} is of format {format_!r}; this version of sslctl reads format {FORMAT}")
    reason = misfit(about, _KEYS) or ("kind is another than its name's" if about["kind"] != _kind_of(path) else None)
    reason = reason or misfit(about["settings"], _SETTINGS[about["kind"]], "settings")
    if reason:
        raise CheckpointError(f"{path} is no classifier that sslctl kept: {reason}")
    return Classifier(**about, path=path)


def _kind_of(path: Path) -> str:
    return path.name.partition("-")[0]


def kept_in(run: Path) -> tuple[list[Classifier], list[CheckpointError]]:
    """Returns the classifiers of a run, and an error for each that cannot be read."""
    classifiers, errors = [], []
    for path in sorted((run / CLASSIFIERS).glob("*.safetensors")):
        if _NAME.fullmatch(path.name):
            try:
                classifiers.append(read(path))
            except CheckpointError as error:
                errors.append(error)
    return classifiers, errors


def choose(classifiers: list[Classifier]) -> Classifier:
    """Returns, of those that were judged on the same images as the newest, the fine-tuned one, else a linear probe, else kNN; of
    several the newest. By their figures the test split would choose."""
    newest = max(classifiers, key=lambda one: one.time)
    alike = [one for one in classifiers if one.judged_on == newest.judged_on]
    return max(alike, key=lambda one: (_ORDER.index(one.kind), one.time))


def command_that_keeps(run: Path, kind: str, *words: str) -> str:
    """Returns the command whose evaluation keeps a classifier of a kind in a run, for a shell."""
    return shell_words(["sslctl", VERBS[kind], run_word(run), *words])


def unfit(classifier: Classifier, run: Path, reason: str) -> InputError:
    """Returns the refusal of a classifier that does not fit together, with the command that makes it again."""
    command = command_that_keeps(run, classifier.kind)
    return InputError(f"{classifier.path} {reason}; {command} makes it again", advice=[command])
