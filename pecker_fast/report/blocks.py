"""What a report is made of, whatever it is written as."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each naming the row. Columns are aligned by ``align``, "l" or "r" each."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    caption: str = ""


def figures_table(rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    """A table of rows of cells, the head first, in which all columns but the first are numbers."""
    return Table(rows[0], rows[1:], "l" + "r" * (len(rows[0]) - 1), caption)


@dataclass(frozen=True)
class Picture:
    """A PNG by its path from the report's folder, with what it shows in words."""

    path: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Lines to be read as they are."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Link:
    """A reference to another report, by the path from this one's folder without its ending."""

    text: str
    path: str


Block = Text | Table | Picture | Code | Link


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def value_text(value: Any) -> str:
    """A value of JSON as a cell has it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_text, value)) or "-"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {value_text(inner)}" for key, inner in value.items()) or "-"
    return str(value)


def _is_records(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(row, Mapping) for row in value)


def _scalars(value: Mapping[str, Any], place: str = "") -> list[tuple[str, Any]]:
    """What of a tree of mappings is no table, by dotted names."""
    found = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found += _scalars(inner, f"{place}{key}.")
        elif not _is_records(inner):
            found.append((f"{place}{key}", inner))
    return found


def _records(value: Mapping[str, Any], place: str = "") -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    found = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found += _records(inner, f"{place}{key}.")
        elif _is_records(inner):
            found.append((f"{place}{key}", inner))
    return found


def blocks_of(value: Mapping[str, Any], caption: str = "") -> list[Block]:
    """Any JSON object: a table of its values by dotted names, and one for each list of objects in it."""
    blocks: list[Block] = []
    scalars = [(name, value_text(inner)) for name, inner in _scalars(value)]
    if scalars:
        blocks.append(Table(("name", "value"), scalars, "ll", caption))
    for name, records in _records(value):
        head = list(dict.fromkeys(key for record in records for key in record))
        rows = [[value_text(record.get(key)) for key in head] for record in records]
        numeric = [all(_is_number(record.get(key)) for record in records) for key in head]
        blocks.append(Table(head, rows, "".join("r" if n else "l" for n in numeric), name))
    return blocks


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
