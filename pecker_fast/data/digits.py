"""scikit-learn's handwritten digits: real images that come with a package, so nothing is downloaded."""

import torch

from .images import LabelledImages

SPLITS = ("train", "test", "all")


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")


def load_digits_images(split: str = "train", seed: int = 0) -> LabelledImages:
    """The 1,797 digits of 8 x 8 pixels (UCI "Optical recognition of handwritten digits", as scikit-learn ships them).

    Parameters
    ----------
    split: "train" (80 % of each class), "test" (the other 20 %) or "all".
    seed: of the split. The shipped judge was trained on seed 0, so other seeds mix its training images into "test".

    Returns
    -------
    LabelledImages: float32 (N, 1, 8, 8), the original 0 to 16 mapped to [-1, 1]; classes "0" to "9".

    Raises
    ------
    ValueError: an unknown split. ImportError: scikit-learn is missing.
    """
    check_split(split)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'pecker-fast[demo]'") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    dataset = LabelledImages(images, labels, tuple(str(name) for name in data.target_names))
    if split == "all":
        return dataset
    return dataset.split(0.8, seed)[SPLITS.index(split)]
