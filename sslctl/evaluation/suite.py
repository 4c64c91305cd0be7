"""sslctl evaluate: the protocols that the configuration names, on features that are extracted once a subject."""

from typing import Any

from sslctl.config.targets import bind, build
from sslctl.data.sources import Source
from sslctl.errors import InputError, say
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Protocol, Task
from sslctl.factory.from_config import build_source
from sslctl.runs.results import Result


def build_protocols(nodes: Any) -> dict[str, Protocol]:
    """Returns the protocols of protocols=[…] by name. Raises InputError for a signature that does not fit, or no protocol."""
    protocols = {}
    for name, node in nodes.items():
        path = f"protocols.{name}"
        protocol, settings = bind(node, path)
        if not (isinstance(protocol, type) and issubclass(protocol, Protocol)):
            raise InputError(f"{path}._target_={node._target_} is no sslctl.evaluation.task.Protocol")
        protocols[name] = build(path, protocol, **settings)
    return protocols


def sources_of(node: Any) -> tuple[Source, Source | None]:
    """Returns (train, test) of a dataset; test is None where there are no labels."""
    train = build_source(node, "train").labelled_part()
    return train, build_source(node, "test").labelled_part() if train.labelled or train.has_several else None


def measure(subject: Subject, task: Task, protocols: dict[str, Protocol]) -> list[Result]:
    """Returns the results of all protocols on one subject. Those that need labels are left out where there are none."""
    splits = [task.read(subject, source) for source in (task.train, task.test) if source is not None]
    sizes = " and ".join(f"{len(split.labels):,} × {split.features.shape[1]}" for split in splits)
    say(f"  {subject.name}: features {sizes}")
    impossible = [name for name, protocol in protocols.items() if protocol.needs_labels and task.test is None]
    if impossible:
        task.omitted.append(
            f"{', '.join(impossible)}: {task.train.name} has no labels; name labelled images with eval_dataset=…"
        )
    if task.train.has_several:
        others = [name for name, protocol in protocols.items() if protocol.needs_labels and not protocol.takes_several]
        impossible += others
        if others:
            why = f"{task.train.name} has several labels an image, these measures know one"
            task.omitted.append(f"{', '.join(others)}: {why}")
    possible = [protocol for name, protocol in protocols.items() if name not in impossible]
    return [result for protocol in possible for result in protocol(subject, task)]
