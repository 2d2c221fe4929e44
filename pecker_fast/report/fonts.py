"""Fonts that have the characters of a text. A character that no font has is written as its number, not as a box."""

import functools
from collections.abc import Iterable
from pathlib import Path

# The font that matplotlib brings with it: Latin, Greek, Cyrillic, Arabic, Hebrew and many signs.
OWN = "DejaVu Sans"


@functools.lru_cache
def _own() -> Path | None:
    """The file of ``OWN``; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@functools.lru_cache
def _characters(path: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(path)).get_charmap())


@functools.lru_cache
def _installed() -> list[tuple[str, Path]]:
    """Name and file of the upright fonts of this machine, once each."""
    from matplotlib import font_manager

    fonts = {}
    for entry in font_manager.fontManager.ttflist:
        # The font of last resort, which matplotlib has too, has a box for everything.
        if entry.style == "normal" and entry.name != OWN and "last resort" not in entry.name.lower():
            fonts.setdefault(entry.name, Path(entry.fname))
    return sorted(fonts.items())


@functools.lru_cache
def _font_with(character: str) -> tuple[str, Path] | None:
    """Name and file of the first font that has a character; None if there is none."""
    own = _own()
    if own is None:
        return None
    for name, path in [(OWN, own), *_installed()]:
        try:
            if ord(character) in _characters(path):
                return name, path
        except (OSError, RuntimeError):
            # A damaged font, or one of a format that matplotlib does not read.
            continue
    return None


def families(text: str) -> list[str]:
    """Names of fonts that have the characters of ``text`` together, for matplotlib: ``OWN`` first."""
    fonts = [OWN, *(font[0] for font in map(_font_with, _visible(text)) if font is not None)]
    return list(dict.fromkeys(fonts))


def legible(text: str, known: Iterable[str] | None = None) -> str:
    """``text`` with the number of each character that no font has, such as U+10FFFF, in its place.

    ``known``: the characters that can be written; by default those of all fonts of this machine.
    """

    def can_be_written(character: str) -> bool:
        return _font_with(character) is not None if known is None else character in known

    missing = {character for character in _visible(text) if not can_be_written(character)}
    return "".join(f"U+{ord(character):04X}" if character in missing else character for character in text)


def _visible(text: str) -> list[str]:
    return [character for character in dict.fromkeys(text) if not character.isspace()]


def picture_font(text: str, size: int):
    """A font of Pillow's for ``text``, and ``text`` as it can be written with it.

    Pillow takes one font for a text: the one that has most of its characters.
    """
    from PIL import ImageFont

    own = _own()
    if own is None:
        # The letters of Pillow's own font.
        return ImageFont.load_default(), legible(text, known=map(chr, range(32, 127)))
    visible = _visible(text)
    paths = dict.fromkeys([own, *(font[1] for font in map(_font_with, visible) if font is not None)])
    best = max(paths, key=lambda path: sum(ord(character) in _characters(path) for character in visible))
    return ImageFont.truetype(str(best), size), legible(text, known=frozenset(map(chr, _characters(best))))
