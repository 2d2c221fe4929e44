"""The parts of a report, independent of the format that it is written in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Caution:
    """A paragraph that the reader must not miss."""

    text: str


@dataclass(frozen=True)
class Items:
    """A numbered list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its title. ``align`` has an "l" or "r" for each column.

    Without a caption, the title of the section is read out in its place.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    caption: str = ""


def figures_table(rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    """A table of rows of cells, the head first, with all columns but the first aligned right."""
    return Table(rows[0], rows[1:], "l" + "r" * (len(rows[0]) - 1), caption)


@dataclass(frozen=True)
class Picture:
    """A PNG, by its path from the report's folder, and a description of it.

    Panels that are named in the file (``panels``) are arranged by the page as its width allows.
    """

    path: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Preformatted lines."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Link:
    """A link to another report, by its path from this report's folder without the suffix."""

    text: str
    path: str


Block = Text | Caution | Items | Table | Picture | Code | Link


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def value_text(value: Any) -> str:
    """A JSON value as the text of a cell."""
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
    """The leaves of a tree of mappings that are no lists of records, by dotted names."""
    leaves = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            leaves += _scalars(inner, f"{place}{key}.")
        elif not _is_records(inner):
            leaves.append((f"{place}{key}", inner))
    return leaves


def _records(value: Mapping[str, Any], place: str = "") -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The lists of records in a tree of mappings, by dotted names."""
    lists = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            lists += _records(inner, f"{place}{key}.")
        elif _is_records(inner):
            lists.append((f"{place}{key}", inner))
    return lists


def blocks_of(value: Mapping[str, Any], caption: str = "") -> list[Block]:
    """Any JSON object as tables: one of its values by dotted names, and one for each list of objects in it."""
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
