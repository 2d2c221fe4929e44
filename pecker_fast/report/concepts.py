"""Several concepts that were forgotten at once, or one request after the other: tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..figures import figure
from ..records import interpreting, read_object
from .blocks import Code, Section, Table, Text, figures_table
from .render import write_document
from .tables import meanings_table, text_table_of

# Figures of a concept, then of its near concepts.
OWN = ("clip_ua", "clip_score", "gcd_score", "no_face_share")
NEAR = ("near_clip_recognised", "near_clip_score", "near_gcd_score", "near_no_face_share")


def by_concept(metrics: dict[str, Any]) -> list[Section]:
    """A section with the figures of each concept and of its near concepts; none if there are not several."""
    recorded = metrics.get("concepts")
    if not recorded:
        return []
    keys = [key for key in (*OWN, *NEAR) if any(values.get(key) is not None for values in recorded.values())]
    rows = [
        (name, values.get("cover") or "-", *(figure(key).number(values.get(key)) for key in keys))
        for name, values in recorded.items()
    ]
    head = ["concept", "cover", *(figure(key).title for key in keys)]
    words = (
        "All concepts were forgotten in one run. Each is measured on prompts of its own; the near concepts are those "
        "that should be preserved beside it."
    )
    return [Section("Concept by concept", [Text(words), Table(head, rows, "ll" + "r" * len(keys), "By concept")])]


def write_concept_sequence(folder: Path, columns: Sequence[str]) -> tuple[Path, str]:
    """Write the report of concepts that were forgotten one after the other: sequence.md and sequence.html.

    Parameters
    ----------
    folder : Path
        Has sequence.json, whose rows have the figures of all concepts forgotten so far, and under "by_concept" those of
        each.
    columns : sequence of str
        Figures of all to show, of which those without a value are left out.

    Returns
    -------
    tuple of (Path, str)
        The path of sequence.md, and its table for a terminal.

    Raises
    ------
    ValueError
        If there is no sequence.json, or it is damaged.
    """
    with interpreting(folder / "sequence.json"):
        return _write(folder, read_object(folder / "sequence.json"), columns)


def _write(folder: Path, sequence: dict[str, Any], columns: Sequence[str]) -> tuple[Path, str]:
    # UA if CLIP measured it, otherwise the score of the celebrity detector.
    rows = sequence["rows"]
    own = next((key for key in ("clip_ua", "gcd_score") if any(row.get(key) is not None for row in rows)), "clip_ua")
    names = [name for name, _ in sequence["concepts"]]
    shown = [figure(key) for key in columns if any(row.get(key) is not None for row in rows)]
    cells = [["request", *(f"{name}: {figure(own).title}" for name in names), *(column.title for column in shown)]]
    for row in rows:
        values = [row["by_concept"].get(name, {}).get(own) for name in names]
        by_concept = ["" if value is None else figure(own).number(value) for value in values]
        cells.append([row["request"], *by_concept, *(column.number(row.get(column.key)) for column in shown)])
    covers = ", ".join(f"“{name}” by “{cover}”" for name, cover in sequence["concepts"])
    request = [Text(f"Method {sequence['method']}, preset {sequence['preset']}, seed {sequence['seed']}: {covers}.")]
    if sequence["score"] is not None:
        start = "that of the previous request" if sequence["score"] == "previous" else "the pretrained network"
        request.append(
            Text(f"Every generator starts from that of the previous request, every score network from {start}.")
        )
    result = [
        figures_table(cells),
        Text("Request i forgets all concepts up to the i-th; all at once has the budget of one request."),
        meanings_table({column.key: column for column in (figure(own), *shown)}.values()),
    ]
    sections = [
        Section("Requests", [*request, Text("Command:"), Code(sequence["command"])]),
        Section("Result", result),
    ]
    return write_document(folder, "Concepts one after the other", sections, "sequence"), text_table_of(cells)
