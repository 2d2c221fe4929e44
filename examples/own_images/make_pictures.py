"""Make a folder of small pictures with a sub-folder for each class, from photographs that come with scikit-image and
scikit-learn: crops of random places and sizes, half of them mirrored.

python examples/own_images/make_pictures.py [FOLDER] [PICTURES OF EACH CLASS] [PIXELS]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

# Sides of the crops, as shares of the photograph's shorter side.
SHARES = 0.3, 0.6


def photographs() -> dict[str, np.ndarray]:
    """Name of a class to its photograph, uint8 (H, W, 3). Names may be in any script."""
    return {
        "astronaut": data.astronaut(),
        "café": data.coffee(),
        "cat": data.chelsea(),
        "flower": load_sample_image("flower.jpg"),
        "rocket": data.rocket(),
        "tissue": data.immunohistochemistry(),
    }


def main(folder: str = "pictures", each: int = 300, size: int = 16) -> None:
    draw = np.random.default_rng(0)
    for name, photograph in photographs().items():
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        height, width = photograph.shape[:2]
        for i in range(each):
            side = int(min(height, width) * draw.uniform(*SHARES))
            top, left = draw.integers(height - side + 1), draw.integers(width - side + 1)
            crop = Image.fromarray(photograph[top : top + side, left : left + side])
            if draw.random() < 0.5:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            crop.resize((size, size), Image.Resampling.BOX).save(target / f"{i:04d}.png")
    print(f"{each} pictures of {size} x {size} pixels of each of {len(photographs())} classes: {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:4]))
