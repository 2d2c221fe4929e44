"""Grids of prompts: several sheets side by side, with names that take lines."""

import numpy as np
import torch
from PIL import Image

from pecker_fast.report import save_before_after, save_side_by_side
from pecker_fast.report.grids import GAP, LABEL_WIDTH, TITLE_HEIGHT


def test_sheets_stand_side_by_side_in_the_order_of_their_titles(tmp_path):
    sheets = {name: torch.full((4, 3, 64, 64), value) for name, value in (("a", -1.0), ("b", 0.0), ("c", 1.0))}
    labels = torch.tensor([0, 0, 1, 1])
    prompts = ("a photo of a very long prompt that needs more than one line " * 3, "short")
    save_side_by_side(tmp_path / "g.png", sheets, labels, prompts, names_width=150)
    picture = np.array(Image.open(tmp_path / "g.png"))
    width = 2 * (64 + GAP) + GAP
    assert picture.shape == (TITLE_HEIGHT + 2 * (64 + GAP) + GAP, 150 + 3 * width + 2 * 12, 3)
    for i, shade in enumerate((0, 128, 255)):
        x = 150 + i * (width + 12) + GAP + 30
        for row in range(2):
            pixel = picture[TITLE_HEIGHT + GAP + row * (64 + GAP) + 30, x]
            assert pixel.tolist() == [shade] * 3, (i, row, pixel)
    # The long name fills its rows; the short one does not.
    written = (picture[TITLE_HEIGHT:, :148] < 200).any(2)
    assert written[: 64 + GAP].sum() > 5 * written[64 + 2 * GAP :].sum() > 0


def test_before_and_after_sheets(tmp_path):
    images, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.tensor([0, 0, 1, 1, 2, 2])
    save_before_after(tmp_path / "b.png", images, -images, labels, ("a", "b", "c"))
    save_side_by_side(tmp_path / "s.png", {"before": images, "after": -images}, labels, ("a", "b", "c"))
    both = [np.array(Image.open(tmp_path / name)) for name in ("b.png", "s.png")]
    assert np.array_equal(*both) and both[0].shape[1] == 2 * (LABEL_WIDTH + 2 * (32 + GAP) + GAP) + 12
