"""Results: what evaluations append to results.jsonl, one JSON line each, and what health and report read there."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sslctl.errors import InputError
from sslctl.runs.directory import read_lines

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured value: by which protocol, of which weights, on which images.

    share: whether the value is a part of 1, which is shown in percent. std, draws: of several draws of labels. ci95:
    [low, high]. params: every setting of the protocol that decides the value, so that results with equal params can be
    compared; details: what came out beside the value. seed: of the evaluation; pretrain_seed: of the run. run, method and
    pretrain_seed are None of foreign weights, step and epoch of what is no run's.
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
    labels: str
    dataset: str
    split: str
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

    def to_json(self) -> str:
        """Returns its line of results.jsonl: std and draws only of several draws, share only where it is not the usual one."""
        left_out = {"std": None, "draws": None, "share": _gives_shares(self.protocol)}
        values = {key: value for key, value in vars(self).items() if key not in left_out or value != left_out[key]}
        return json.dumps({"format": FORMAT, **values})

    @classmethod
    def from_line(cls, line: dict, where: str) -> "Result":
        """Returns the result that a parsed line holds; `where` names the line in the InputError for one that is none.

        A line without a format was written before there was one, with the keys of format 1.
        """
        if not isinstance(line, dict):
            raise InputError(f"{where}: no result of format {FORMAT}: found {type(line).__name__}")
        values = {"share": _gives_shares(line.get("protocol"))} | line
        if (format_ := values.pop("format", FORMAT)) != FORMAT:
            raise InputError(f"{where}: results of format {format_} are not known, only of format {FORMAT}")
        fields = dataclasses.fields(cls)
        missing = {f.name for f in fields if f.default is dataclasses.MISSING} - values.keys()
        unknown = values.keys() - {f.name for f in fields}
        if missing or unknown:
            lists = (("without", missing), ("with unknown", unknown))
            parts = [f"{words} {', '.join(sorted(keys))}" for words, keys in lists if keys]
            raise InputError(f"{where}: no result of format {FORMAT}: {' and '.join(parts)}")
        return cls(**values)


def _gives_shares(protocol: str | None) -> bool:
    """Tells whether a line of this protocol is of a share unless it says otherwise."""
    return protocol != "label-free"


def read_results(path: Path) -> list[Result]:
    """Returns the results of a results.jsonl, none where there is no such file. Raises InputError with the line."""
    return [Result.from_line(line, f"{path} line {i}") for i, line in enumerate(read_lines(path), start=1)]


def refuse_other_file(path: Path) -> None:
    """Raises InputError for a file that holds anything but results: what seems cut off at its end would be overwritten."""
    if path.is_dir():
        raise InputError(f"{path} is a directory: name a file for the results")
    try:
        read_results(path)
        cut = path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not (cut.startswith(b'{"') or b'{"'.startswith(cut)):
        raise InputError(f"{path} holds other lines than results: nothing is appended to it, name another file")


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Writes all results at once, behind the last whole line: a kill may have cut one off. For files of results alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    with path.open("a") as opened:
        opened.truncate(len(whole[0]) + len(whole[1]))
        opened.write("".join(f"{result.to_json()}\n" for result in results))
