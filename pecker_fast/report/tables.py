"""Rows of cells, the head first, as text."""

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one after it; all columns but the first are numbers."""
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "| --- |" + " ---: |" * (len(rows[0]) - 1), *rest, ""]


def text_table_of(rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal, with columns of fixed width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[i].ljust(w) if i == 0 else row[i].rjust(w) for i, w in enumerate(widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
