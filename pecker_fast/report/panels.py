"""Where the panels of a picture are: recorded in its PNG, so that a page can arrange them by its own width."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The text chunk of the PNG.
KEY = "pecker_fast_panels"
# The name of the panel that explains the others.
LEGEND = "Legend"


@dataclass(frozen=True)
class Panel:
    """A part of a picture.

    Parameters
    ----------
    name : str
        What it shows.
    box : tuple of int
        Left, top, right and bottom in pixels.
    """

    name: str
    box: tuple[int, int, int, int]


def described(panels: Sequence[Panel]) -> str:
    """The panels as the text of the chunk."""
    return json.dumps([[panel.name, *panel.box] for panel in panels])


def cut(path: Path) -> list[tuple[str, bytes]]:
    """The name and the PNG of each panel of a picture; the whole file, without a name, if it records none."""
    whole = path.read_bytes()
    try:
        from PIL import Image

        with Image.open(io.BytesIO(whole)) as picture:
            panels = [Panel(name, tuple(box)) for name, *box in json.loads(picture.info[KEY])]
            parts = [(panel.name, _png(picture.crop(panel.box))) for panel in panels]
    except (ImportError, KeyError, OSError, TypeError, ValueError):
        return [("", whole)]
    return parts if len(parts) > 1 else [("", whole)]


def _png(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
