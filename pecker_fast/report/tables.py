"""Rows of cells, the head first, for a terminal."""

from collections.abc import Sequence


def text_table_of(rows: Sequence[Sequence[str]]) -> str:
    """The rows with columns of fixed width; all but the first are numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[i].ljust(w) if i == 0 else row[i].rjust(w) for i, w in enumerate(widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
