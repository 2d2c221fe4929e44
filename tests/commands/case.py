"""Shared by tests of the command line: short runs, wrong input, images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pecker_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "pecker_fast" / "assets"
SMALL = ["--max_train_steps", "4", "--train_batch_size", "3", "--forget_batch_size", "2", "--samples_per_class", "3"]
QUIET = ["--no-progress_bar"]


def fails(capsys, *arguments: str) -> str:
    """Run a command that must end with status 2 and one line, and return that line."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def image_folder(path: Path, classes: int = 3, each: int = 4) -> Path:
    """Photographs of nothing, of several sizes, in a folder a class."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        (path / f"class{label}").mkdir(parents=True)
        for i in range(each):
            pixels = draw.integers(0, 256, (30 + 20 * i, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"class{label}" / f"{i}.png")
    return path
