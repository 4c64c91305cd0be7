"""Kinds and ranges of configuration keys: what fits where, and that each number has a range."""

import typing
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import pytest
import yaml
from omegaconf import OmegaConf

from sslctl.config.command_line import Prepared
from sslctl.config.diagnose import compose_choices
from sslctl.config.keys import UNTYPED, KeyFacts, facts_in
from sslctl.config.kinds import describe, fits, is_usable
from sslctl.config.ranges import keys_with_ranges, range_of
from sslctl.config.schema import CONFIGS, SCHEMAS
from sslctl.config.validation import mistakes, range_mistake

# Numbers that have no range by themselves.
ANY_NUMBER = {"mean"}
# Lists whose range is that of a pair: validation.py checks them for themselves.
PAIRS = {"scale", "ratio"}


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        ("1", float, False),
        (False, float, False),
        (None, float | None, True),
        (None, float, False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ([[1], [2]], list[list[int]], True),
        ([[1], 2], list[list[int]], False),
        ([0.9, 0.99], tuple[float, float], True),
        ({"a": 1}, dict[str, int], True),
        ({"a": "b"}, dict[str, int], False),
        ({"a": "b"}, dict, True),
        ("full", Literal["full", "half"], True),
        ("none", Literal["full", "half"], False),
        ({}, list, False),
        ("anything", Any, True),
    ],
)
def test_a_value_fits_its_annotation_down_to_its_entries(value, hint, expected):
    assert fits(value, hint) is expected


@pytest.mark.parametrize(
    ("hint", "words"),
    [(int | None, "a whole number or null"), (list[float], "a list of numbers"), (Literal["a", "b"], "one of a, b")],
)
def test_an_annotation_is_described_in_words(hint, words):
    assert describe(hint) == words


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, -(2**64)])
def test_numbers_that_nothing_calculates_with_are_none(value):
    assert not is_usable(value)
    assert is_usable(2**62)
    assert is_usable("nan")


def has_range(facts: KeyFacts) -> bool:
    return bool(facts.choices) or (facts.low, facts.high, facts.above) != (None, None, None)


def numbers_of(schema: type, prefix: str = "") -> typing.Iterator[tuple[str, KeyFacts]]:
    """(path, facts) of the keys of a schema that hold a number or several."""
    hints = typing.get_type_hints(schema)
    for field in fields(schema):
        hint = hints[field.name]
        inner = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else hint
        if is_dataclass(inner):
            yield from numbers_of(inner, f"{prefix}{field.name}.")
        elif {int, float} & {hint, *typing.get_args(hint)}:
            yield f"{prefix}{field.name}", facts_in(field)


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_number_of_a_schema_has_a_range(verb):
    without = {path for path, facts in numbers_of(SCHEMAS[verb]) if not has_range(facts)}
    assert {path for path in without if path.rpartition(".")[2] not in PAIRS} == set()


def numbers_in_files() -> dict[str, str]:
    """key -> file, of the numbers of methods, networks, optimizers, schedules and datasets."""

    def leaves(node: Any, path: str) -> typing.Iterator[tuple[str, Any]]:
        for name, value in node.items():
            inner = f"{path}.{name}".lstrip(".")
            yield from leaves(value, inner) if isinstance(value, dict) else [(inner, value)]

    numbers = {}
    for group in ("method", "backbone", "optimizer", "scheduler", "dataset"):
        for path in sorted((CONFIGS / group).glob("*.yaml")):
            content = yaml.safe_load(path.read_text())
            node = content["method"] if group == "method" else content
            for key, value in leaves({k: v for k, v in node.items() if k != "defaults"}, group):
                several = value if isinstance(value, list) else [value]
                if any(isinstance(v, int | float) and not isinstance(v, bool) for v in several):
                    numbers[key] = path.name
    return numbers


def test_every_number_of_the_files_has_a_range_by_its_key_or_its_name():
    numbers = numbers_in_files()
    assert len(numbers) > 80
    free = {k for k in numbers if not has_range(UNTYPED.get(k, KeyFacts())) and range_of(k.rpartition(".")[2]) is None}
    assert {key for key in free if key.rpartition(".")[2] not in ANY_NUMBER} == set()


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("temperature_start", 0.1, ""),
        ("teacher_temperature", 0, "more than 0"),
        ("momentum", 1.0, ""),
        ("momentum", 1.01, "at most 1"),
        ("betas", [0.9, 1.5], "at most 1"),
        ("rho", -0.1, "at least 0"),
        ("out_dim", 1, ""),
        ("out_dim", 0, "at least 1"),
        ("queue_size", 0, ""),
        ("queue_size", -1, "at least 0"),
        ("widths", [4, 8], ""),
        ("widths", [4, 0], "at least 1"),
        ("widths", [], "at least one value"),
        ("layer_decay", 0, "more than 0"),
    ],
)
def test_a_value_past_the_range_of_its_name_is_a_mistake(name, value, wrong):
    mistakes = range_mistake(f"method.{name}", value, range_of(name))
    assert [mistake.partition("expected ")[2] for mistake in mistakes] == ([wrong] if wrong else [])


def test_ranges_go_by_whole_names_and_by_sslctls_and_torchs_own_classes():
    assert range_of("temperatures") is None
    nodes = {
        "method": {"_target_": "mine.Method", "temperature": 0},
        "backbone": {"_target_": "sslctl.models.backbones.MLP", "widths": [0], "norm": "batch"},
        "optimizer": {"_target_": "torch.optim.SGD", "momentum": 2},
    }
    keys = keys_with_ranges(OmegaConf.create(nodes))
    assert [(path, value) for path, value, _ in keys] == [("backbone.widths", [0]), ("optimizer.momentum", 2)]


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("knn.k", [5, 0], "protocols.knn.k=0: expected at least 1"),
        ("retrieval.depth", -1, "protocols.retrieval.depth=-1: expected at least 1"),
        ("linear.draws", 1, "protocols.linear.draws=1: expected at least 2"),
        ("linear.probe", {"epochs": 0}, "protocols.linear.probe.epochs=0: expected at least 1"),
        ("label_free.pairs", 2, None),
    ],
)
def test_a_protocols_own_keys_have_the_ranges_of_those_that_they_stand_for(key, value, wrong):
    node = compose_choices("evaluate", Prepared(), [])
    assert mistakes(SCHEMAS["evaluate"], node) == []
    OmegaConf.update(node.protocols, key, value, merge=False)
    assert mistakes(SCHEMAS["evaluate"], node) == ([wrong] if wrong else [])


def test_what_refers_to_another_key_is_that_keys_mistake_and_somebodys_protocol_means_what_it_likes():
    node = compose_choices("evaluate", Prepared(), ["knn.temperature=0"])
    assert mistakes(SCHEMAS["evaluate"], node) == ["knn.temperature=0.0: expected more than 0"]
    OmegaConf.update(node, "knn.temperature", 1)
    node.protocols = {"knn": {"_target_": "mine.Knn", "k": 0}}
    assert mistakes(SCHEMAS["evaluate"], node) == []
