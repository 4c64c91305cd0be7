"""Imports run one way: a package takes from the layers below its own, never from its own layer's neighbours or from above."""

import ast
import re
from pathlib import Path

import sslctl

ROOT = Path(sslctl.__file__).parent
LAYERS = (  # from the ground up; the packages of a line do not know each other
    ("errors", "schedules", "signals", "transfer"),
    ("distributed", "ending", "random"),
    ("losses", "ops", "config"),
    ("runs",),
    ("views",),
    ("data",),
    ("models",),
    ("methods",),
    ("factory",),
    ("training",),
    ("evaluation",),
    ("visuals", "export"),
    ("report",),
    ("cli",),
    ("commands",),
)
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}


def imports():
    """(importing part, imported part, file:line) of every import inside sslctl, also those in functions."""
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sslctl":
                parts = node.module.split(".")
                for name in [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]:
                    yield own, name, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_part_has_a_layer():
    parts = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__", "__main__", "configs"} == set(FLOOR)


def test_imports_run_down_the_layers():
    wrong = [
        f"{where}: {own} takes from {name}"
        for own, name, where in imports()
        if own in FLOOR and own != name and FLOOR[name] >= FLOOR[own]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_architecture_page_names_files_that_exist():
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"`((?:[a-z_]+/)*[a-z_0-9]+\.(?:py|yaml|md))`", page))
    assert len(names) > 25
    missing = [name for name in names if not any((folder / name).exists() for folder in (ROOT, ROOT.parent))]
    assert not missing
