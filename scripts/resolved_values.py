"""Writes what every configuration resolves to, of all that bears on what is trained: tests/resolved/*.yaml, a line a value.

    python scripts/resolved_values.py

Each experiment by the command in its header, each method alone (on the digits, or the data it asks for) and each augmentation.
tests/test_resolved_values.py compares: a default that changes a recipe shows in the difference of these files.
"""

import functools
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.config.schema import CONFIGS
from sslctl.runs.fingerprint import flat

FOLDER = Path(__file__).parents[1] / "tests" / "resolved"
GROUPS = ("dataset", "augmentation", "backbone", "optimizer", "scheduler", "trainer", "method")
OF_THE_DATASET = ("image_size", "channels", "drops", "resize", "mean", "std")  # the rest says where images lie
OF_THE_TRAINER = ("epochs", "batch_size", "precision", "accumulate_steps", "clip_grad_norm")


def choices(group: str) -> list[str]:
    """The files of a group of configurations."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def header_words(experiment: str) -> list[str]:
    """The words of the command that ends an experiment's header, without `sslctl pretrain`."""
    header = [
        line for line in (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines() if line[:1] == "#"
    ]
    return header[-1].removeprefix("# sslctl pretrain ").split()


@functools.cache
def composed(verb: str, *words: str) -> DictConfig:
    """The configuration of a command; one for all who ask, who leave it as it is."""
    return compose_choices(verb, Prepared(), list(words))


def values(config: DictConfig, groups: tuple[str, ...] = GROUPS) -> dict[str, object]:
    """The resolved values by which a run trains, under flat keys."""
    resolved = {key: OmegaConf.to_container(config[key], resolve=True) for key in groups}
    for group, own in (("dataset", OF_THE_DATASET), ("trainer", OF_THE_TRAINER)):
        if group in resolved:
            resolved[group] = {key: resolved[group][key] for key in own if key in resolved[group]}
    return flat(resolved)


def tables() -> dict[str, dict[str, dict[str, object]]]:
    """File -> configuration -> its values."""
    return {
        "experiments": {name: values(composed("pretrain", *header_words(name))) for name in choices("experiment")},
        "methods": {name: values(composed("pretrain", f"method={name}")) for name in choices("method")},
        "augmentations": {
            name: values(composed("views", f"augmentation={name}"), ("augmentation",))
            for name in choices("augmentation")
        },
    }


def text(table: dict[str, dict[str, object]]) -> str:
    """A table as YAML, a line a value."""
    lines = []
    for name, own in table.items():
        lines += [f"{name}:", *(f"  {key}: {json.dumps(value)}" for key, value in own.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, table in tables().items():
        (FOLDER / f"{file}.yaml").write_text(text(table))
        print(f"tests/resolved/{file}.yaml: {len(table)} configurations, {sum(map(len, table.values()))} values")
