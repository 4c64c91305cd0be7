"""The records of small_benchmark.py, one JSON line a run and subject, and the Markdown tables made of them."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from small_benchmark_recipes import TABLES, Table

DIGITS = {"feature std": 3, "images/s": 0, "MiB": 0, "minutes": 1}
OF_ONE_MACHINE = ("images/s", "MiB", "minutes")  # without a spread over seeds
VERSIONS = ("torch", "cpu")


def read(path: Path, table: str) -> list[dict]:
    """The table's records; of two of one run, the later."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(r["name"], r["seed"], r["subject"]): r for r in lines if r["table"] == table}.values())


def append(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as opened:
        opened.write("".join(json.dumps(record) + "\n" for record in records))


def markdown(records: list[dict], table: Table) -> str:
    """Families of methods, then what they are compared with."""

    def of(name: str, subject: str) -> list[dict]:
        return [r for r in records if r["name"] == name and r["subject"] == subject]

    lines = [f"| method | {' | '.join(table.columns)} |", "|---" * (len(table.columns) + 1) + "|"]
    for family, methods in table.families.items():
        names = [
            n
            for m in methods
            for n in sorted({r["name"] for r in records if r["subject"] == "trained"})
            if n.partition("+")[0] == m
        ]
        lines += [f"| *{family}* |{' |' * len(table.columns)}"] if names else []
        lines += [line(_words(name, table), of(name, "trained"), table.columns) for name in names]
    others = [(of(name, "random"), f"random weights, {words}") for name, words in table.random.items()]
    others += [(of(table.pixels, "pixels"), "raw pixels")] if table.pixels else []
    if any(rows for rows, _ in others):
        lines.append(f"| *compared with* |{' |' * len(table.columns)}")
    return "\n".join([*lines, *(line(words, rows, table.columns) for rows, words in others if rows)])


def _words(name: str, table: Table) -> str:
    method, _, epochs = name.partition("+")
    method, _, variant = method.partition("-")
    words = f"`{method}`" + (f", {variant}" if variant else "")
    return words + (f", {table.epoch * int(epochs):,} images" if epochs else "")


def line(name: str, rows: list[dict], columns: Iterable[str]) -> str:
    """A table's row: mean ± standard deviation over seeds; one seed's value alone."""
    cells = []
    for column in columns:
        values = [row[column] for row in rows if column in row]
        digits = DIGITS.get(column, 2)
        spread = len(values) > 1 and column not in OF_ONE_MACHINE
        text = f"{statistics.mean(values):,.{digits}f}" if values else ""
        cells.append(text + (f" ± {statistics.stdev(values):.{digits}f}" if spread else ""))
    return f"| {name}{f' ({len(rows)} seeds)' if len(rows) > 1 else ''} | {' | '.join(cells)} |"


def write(record: Path, path: Path) -> None:
    """Puts each table between its two marks in a document."""
    put(path, {name: markdown(read(record, name), table) for name, table in TABLES.items()})


def put(path: Path, tables: dict[str, str]) -> None:
    """Puts Markdown tables between their two marks in a document, `<!-- name -->` and `<!-- /name -->`."""
    text = path.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, actual, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not actual or not closed:
            raise SystemExit(f"{path} has no {begin} … {end}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    path.write_text(text)
