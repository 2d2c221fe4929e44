"""Several concepts that were forgotten at once: a table with a row for each."""

from typing import Any

from ..figures import figure
from .blocks import Section, Table, Text

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
