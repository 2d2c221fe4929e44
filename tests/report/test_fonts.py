"""Labels in any alphabet: a font that has their characters, or their numbers."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pecker_fast.report import fonts, save_grid, save_side_by_side
from pecker_fast.report.curves import new_panels, save_figure
from pecker_fast.report.panels import cut

pytest.importorskip("matplotlib")
# No font has a noncharacter.
NOWHERE = "\U0010fffe"


def test_what_no_font_has_is_written_as_its_number():
    assert fonts.legible("größe, кошка, θ₀") == "größe, кошка, θ₀"
    assert fonts.legible(f"a{NOWHERE} b") == "aU+10FFFE b" and fonts.families("кошка") == [fonts.OWN]
    font, text = fonts.picture_font(f"θ₀{NOWHERE}", 10)
    assert text == "θ₀U+10FFFE" and font.getname()[0] == fonts.OWN


def test_characters_that_only_another_font_has(monkeypatch):
    """Of a machine whose second font has what the first one lacks."""
    own = fonts._own()
    other = own.with_name("DejaVuSansMono.ttf")
    monkeypatch.setattr(fonts, "_font_with", lambda c: ("Other", other) if c == "漢" else (fonts.OWN, own))
    monkeypatch.setattr(fonts, "_characters", lambda path: frozenset(map(ord, "漢" if path == other else "abc")))
    assert fonts.families("a漢") == [fonts.OWN, "Other"]
    assert fonts.picture_font("漢", 10)[0].path == str(other) and fonts.picture_font("ab漢", 10)[1] == "abU+6F22"


def written(name: str, tmp_path, width: int = 44) -> np.ndarray:
    """The pixels beside the images of a class of this name."""
    save_grid(tmp_path / "g.png", torch.zeros(1, 1, 32, 32), torch.tensor([0]), (name,))
    return np.array(Image.open(tmp_path / "g.png").convert("L"))[:, :width]


def test_names_in_pictures_are_letters_and_not_boxes(tmp_path):
    font = fonts.picture_font("кот", 10)[0]
    boxes = Image.new("L", (44, 36), 255)
    ImageDraw.Draw(boxes).text((4, 11), NOWHERE * 3, font=font, fill=40)
    drawn = written("кот", tmp_path)
    assert (drawn < 128).any() and not np.array_equal(drawn[:36], np.array(boxes)[: len(drawn)])
    assert not np.array_equal(drawn, written("кит", tmp_path)) and np.array_equal(drawn, written("кот", tmp_path))


def test_names_have_the_space_that_they_need(tmp_path):
    """The whole of "aeroplane", which six letters cut short."""
    images, labels = torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])
    widths = []
    for names in (("a", "b"), ("aeroplane", "b"), ("a rather long name of a class of images " * 3, "b")):
        save_grid(tmp_path / "g.png", images, labels, names)
        widths.append(Image.open(tmp_path / "g.png").width)
    assert widths[0] < widths[1] < widths[2] < 200
    save_side_by_side(tmp_path / "s.png", {"before": images, "after": -images}, labels, ("aeroplane", "b"))
    parts = cut(tmp_path / "s.png")
    assert [name.split(",")[0] for name, _ in parts] == ["before", "after"]


def test_curves_have_fonts_for_their_labels(tmp_path, recwarn):
    canvas, (panel, *_) = new_panels(2)
    panel.plot([0, 1], [0, 1], label=f"кошка {NOWHERE}")
    panel.set_ylabel("größe")
    panel.legend()
    save_figure(canvas, tmp_path / "c.png")
    # matplotlib warns of every character that it cannot draw.
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert "U+10FFFE" in panel.get_legend().get_texts()[0].get_text()
    name, _ = cut(tmp_path / "c.png")[0]
    assert name == "größe"
