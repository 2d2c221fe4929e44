"""Tables of figures for pages and for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..figures import Figure, figure
from .blocks import Table


def text_table_of(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the head first, in columns of fixed width; all columns but the first are aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[i].ljust(w) if i == 0 else row[i].rjust(w) for i, w in enumerate(widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def metrics_table(keys: Iterable[str], metrics: Mapping[str, Mapping[str, Any]], caption: str = "") -> Table:
    """A row a figure: its label, its value in each of ``metrics`` (title to figures), which way is better, meaning."""
    rows = []
    for key in keys:
        row = figure(key)
        rows.append((row.label, *(row.text(of.get(key)) for of in metrics.values()), row.direction, row.meaning))
    return Table(("figure", *metrics, "better", "meaning"), rows, "l" + "r" * len(metrics) + "ll", caption)


def meanings_table(figures: Iterable[Figure], caption: str = "What the columns mean") -> Table:
    """What the columns of a table mean that have these figures' titles."""
    rows = [(row.title, row.label, row.direction, row.meaning) for row in figures]
    return Table(("column", "figure", "better", "meaning"), rows, "llll", caption)
