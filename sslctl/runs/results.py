"""Results: what evaluations append to results.jsonl, one JSON line each, and what health and report read there."""

import dataclasses
import functools
import json
import os
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslctl.errors import InputError
from sslctl.runs.atomic import why_unwritable_file
from sslctl.runs.checksums import sign_json
from sslctl.runs.reading import lines_of, read_lines
from sslctl.runs.schema import misfit

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured value: by which protocol, of which weights, on which images.

    share: whether the value is a part of 1, which is shown in percent. std, draws: of several draws of labels. ci95:
    [low, high]. params: every setting of the protocol that decides the value, so that results with equal params can be
    compared; details: what came out beside the value. seed: of the evaluation; pretrain_seed: of the run. run, method and
    pretrain_seed are None of weights that are no run's, step and epoch of what is no run's. data_changed: at which steps the
    run went on with other images, of one that did. content: the hash of the images measured on, classes: of their classes'
    names; None in lines of earlier versions.
    """

    protocol: str
    metric: str
    value: float
    share: bool = True
    std: float | None = None
    draws: int | None = None
    ci95: list[float] | None
    subject: str
    run: str | None
    method: str | None
    backbone: str | None
    pretrain_seed: int | None
    data_changed: str | None = None
    labels: str
    dataset: str
    split: str
    content: str | None = None
    classes: str | None = None
    images: int
    seed: int | None
    step: int | None
    epoch: float | None
    epoch_rule: str
    features: str
    preprocess: str
    params: dict
    backbone_parameters: int
    weights_sha256: str
    details: dict
    command: str | None
    cwd: str
    versions: dict[str, str]
    time: str

    @property
    def measured_on(self) -> tuple[str, str, str | None, str | None]:
        """Returns which images and classes it is of: name, split, hash of the images and of the classes' names."""
        return self.dataset, self.split, self.content, self.classes

    def to_json(self) -> str:
        """Returns its line of results.jsonl: what few results have only where they do, share where it is not the usual one."""
        left_out = {
            "std": None,
            "draws": None,
            "data_changed": None,
            "content": None,
            "classes": None,
            "share": _gives_shares(self.protocol),
        }
        values = {key: value for key, value in vars(self).items() if key not in left_out or value != left_out[key]}
        return json.dumps({"format": FORMAT, **values})

    @classmethod
    def from_line(cls, line: Any) -> "Result":
        """Returns the result that a parsed line holds. Raises ValueError with what makes it none.

        A line without a format was written before there was one, with the keys of format 1.
        """
        if not isinstance(line, dict):
            raise ValueError(f"no result of format {FORMAT}: {misfit(line, dict)}")
        values = {"share": _gives_shares(line.get("protocol"))} | line
        if (format_ := values.pop("format", FORMAT)) != FORMAT:
            raise ValueError(f"results of format {format_} are not known, only of format {FORMAT}")
        if reason := misfit(values, _keys()) or _contradiction(values):
            raise ValueError(f"no result of format {FORMAT}: {reason}")
        return cls(
            **values | {"subject": "given" if values["subject"] == "foreign" else values["subject"]}
        )  # until 0.1


def _contradiction(values: dict) -> str | None:
    """Says which value of a result of the right types cannot be; None where each can."""
    number, _, per_class = values["labels"].partition("/")
    is_amount = number.replace(".", "", 1).isdecimal() and per_class in ("", "class")
    expected = {
        "value: expected a share, from 0 to 1": values["metric"] not in ("top1", "top5", "mAP")
        or 0 <= values["value"] <= 1,
        "labels: expected all, none, a number a class or a share": values["labels"] in ("all", "none") or is_amount,
        "ci95: expected two numbers": values["ci95"] is None or len(values["ci95"]) == 2,
        "images: expected at least 1": values["images"] > 0,
        "details.dim: expected a whole number": values["metric"] != "feature_std"
        or type(values["details"].get("dim")) is int,
        "params.k: expected a whole number": values["protocol"] != "knn" or type(values["params"].get("k")) is int,
    }
    return next((reason for reason, holds in expected.items() if not holds), None)


@functools.cache
def _keys() -> dict[str, Any]:
    """Returns the schema of a line: the fields of a result, where those with a default may be missing."""
    types, fields = typing.get_type_hints(Result), dataclasses.fields(Result)
    return {f.name + "?" * (f.default is not dataclasses.MISSING): types[f.name] for f in fields}


def _gives_shares(protocol: str | None) -> bool:
    """Tells whether a line of this protocol is of a share unless it says otherwise."""
    return protocol != "label-free"


def read_results(path: Path) -> list[Result]:
    """Returns the results of a results.jsonl, none where there is no such file. Raises Damaged with the first line that is
    none."""
    return read_lines(path, Result.from_line)


def refuse_unfit(path: Path) -> None:
    """Raises InputError for a file that holds anything but results, or to which none can be appended; changes nothing."""
    if path.is_dir():
        raise InputError(f"{path} is a directory: name a file for the results")
    lines = lines_of(path, Result.from_line)
    if lines.damages:
        raise InputError(
            f"{lines.damages[0].describe()}; nothing is appended to what holds more than results: name another file"
        )
    if reason := why_unwritable_file(path):
        raise InputError(f"{path} cannot be written: {reason}; name another file with out=")


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Writes all results at once, behind the last whole line: a kill may have cut one off. For files of results alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = lines_of(path, Result.from_line)
    new = "".join(f"{sign_json(result.to_json())}\n" for result in results).encode()
    with path.open("ab") as opened:
        if lines.cut:
            opened.truncate(opened.seek(0, os.SEEK_END) - len(lines.cut))
        elif lines.ends_open:  # a whole line, whose end alone is missing
            new = b"\n" + new
        opened.write(new)
