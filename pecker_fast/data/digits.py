"""scikit-learn's handwritten digits: real images that come with a package, so nothing is downloaded."""

import torch
import torch.nn.functional as F

from .images import LabelledImages

SPLITS = ("train", "test", "all")
# Pixels of a side, as scikit-learn ships them.
SIZE = 8


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")


def load_digits_images(split: str = "train", seed: int = 0, image_size: int | None = None) -> LabelledImages:
    """The 1,797 digits of 8 x 8 pixels (UCI "Optical recognition of handwritten digits", as scikit-learn ships them).

    At a larger ``image_size`` they are the same images, made larger by bicubic interpolation and cut to [-1, 1]: more
    pixels, nothing more to see.

    Parameters
    ----------
    split: "train" (80 % of each class), "test" (the other 20 %) or "all".
    seed: of the split. The shipped judge was trained on seed 0, so other seeds mix its training images into "test".
    image_size: height and width in pixels, at least 8; None: 8.

    Returns
    -------
    LabelledImages: float32 (N, 1, image_size, image_size), the original 0 to 16 mapped to [-1, 1]; classes "0" to "9".

    Raises
    ------
    ValueError: an unknown split, or an image size below 8. ImportError: scikit-learn is missing.
    """
    check_split(split)
    size = SIZE if image_size is None else image_size
    if isinstance(size, bool) or not isinstance(size, int) or size < SIZE:
        raise ValueError(f"image_size is {image_size!r}, expected a whole number of pixels, at least {SIZE}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'pecker-fast[demo]'") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    if size != SIZE:
        images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    dataset = LabelledImages(images, labels, tuple(str(name) for name in data.target_names))
    if split == "all":
        return dataset
    return dataset.split(0.8, seed)[SPLITS.index(split)]
