"""scikit-learn's handwritten digits: real images that need no download."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_int
from .images import LabelledImages

SPLITS = ("train", "test", "all")
# Height and width of scikit-learn's images.
SIZE = 8


def load_digits_images(split: str = "train", seed: int = 0, image_size: int | None = None) -> LabelledImages:
    """Load the 1,797 digits of 8 x 8 pixels (UCI "Optical recognition of handwritten digits") from scikit-learn.

    A larger ``image_size`` gives the same images after bicubic interpolation, clamped to [-1, 1], without more detail.

    Parameters
    ----------
    split : {"train", "test", "all"}
        80 % of each class, the other 20 %, or all images.
    seed : int
        Seed of the split. The shipped judge was trained with seed 0; with other seeds "test" has some of its training
        images.
    image_size : int, optional
        Height and width in pixels, at least 8; 8 by default.

    Returns
    -------
    LabelledImages
        float32 (N, 1, image_size, image_size), the original values 0 to 16 mapped to [-1, 1]; classes "0" to "9".

    Raises
    ------
    ValueError, TypeError
        If the split is unknown, or the image size is below 8 or not an integer.
    ImportError
        If scikit-learn is missing.
    """
    check_choice("split", split, SPLITS)
    size = SIZE if image_size is None else image_size
    check_int("image_size", size, SIZE)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'pecker-fast[train]'") from error
    data = load_digits()
    images = enlarged(torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, size)
    labels = torch.tensor(data.target, dtype=torch.int64)
    dataset = LabelledImages(images, labels, tuple(str(name) for name in data.target_names))
    if split == "all":
        return dataset
    return dataset.split(0.8, seed)[SPLITS.index(split)]


def enlarged(images: Tensor, size: int) -> Tensor:
    """Interpolate images, float32 (N, C, H, W) in [-1, 1], to ``size`` pixels along each side; of that size they are
    returned as they are."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
