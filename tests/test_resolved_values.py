"""What every configuration resolves to is committed: a default that changes a recipe shows in a difference."""

import pytest
from resolved_values import FOLDER, choices, composed, header_words, tables, text

from sslctl.commands.check import problems_of

COMMAND = "python scripts/resolved_values.py"


@pytest.fixture(scope="module")
def now():
    return tables()


def lines(table: str) -> list[str]:
    """A file's lines, each with the configuration that it is of."""
    name, result = "", []
    for line in table.splitlines():
        name = line if line[:1] != " " else name
        result.append(f"{name} {line.strip()}")
    return result


@pytest.mark.parametrize("file", [pytest.param("experiments", marks=pytest.mark.slow), "methods", "augmentations"])
def test_every_value_is_the_committed_one(now, file):
    committed, actual = lines((FOLDER / f"{file}.yaml").read_text()), lines(text(now[file]))
    before, after = sorted(set(committed) - set(actual)), sorted(set(actual) - set(committed))
    assert (before, after) == ([], []), f"as intended? {COMMAND} writes the new values"
    assert committed == actual, f"other values' order: {COMMAND}"


def test_no_other_file_is_committed(now):
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(now), COMMAND


@pytest.mark.usefixtures("now")
def test_sslctl_check_finds_nothing_wrong_in_them():
    commands = [tuple(header_words(name)) for name in choices("experiment")]
    commands += [(f"method={name}",) for name in choices("method")]
    problems = [problems_of("pretrain", lambda verb, own, words: composed(verb, *words), None, w) for w in commands]
    assert [(words, its) for words, its in zip(commands, problems, strict=True) if its] == []
