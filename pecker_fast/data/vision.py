"""CIFAR-10, STL-10 and folders of images, read through torchvision."""

import math
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_int, check_utf8
from .digits import SPLITS
from .images import LabelledImages, LazyImages

if TYPE_CHECKING:
    from PIL.Image import Image

# Images resized at a time: all of STL-10 in float32 would take gigabytes.
RESIZE_CHUNK = 256


def _torchvision() -> ModuleType:
    try:
        import torchvision
    except ImportError as error:
        raise ImportError("CIFAR-10, STL-10 and folders need torchvision: pip install 'pecker-fast[train]'") from error
    return torchvision


def load_cifar10(
    root: str | os.PathLike, split: str = "train", *, download: bool = False, image_size: int | None = None
) -> LabelledImages:
    """Load CIFAR-10 (Krizhevsky 2009): 50,000 images for training and 10,000 for testing.

    Parameters
    ----------
    root : str or os.PathLike
        Folder that has ``cifar-10-batches-py``.
    split : {"train", "test", "all"}
        Which part.
    download : bool
        Whether to download the files (170 MB) if they are missing.
    image_size : int, optional
        Height and width in pixels; the original 32 by default.

    Returns
    -------
    LabelledImages
        uint8 storage, (N, 3, image_size, image_size).

    Raises
    ------
    FileNotFoundError
        If the files are missing.
    ValueError, TypeError
        If the files are damaged, or an argument is invalid.
    ImportError
        If torchvision is missing.
    """
    _check(root, split, image_size)
    parts = [
        _open("CIFAR-10", root, "cifar-10-batches-py", _torchvision().datasets.CIFAR10, download, train=part == "train")
        for part in _parts(split)
    ]
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)
    labels = [label for part in parts for label in part.targets]
    return LabelledImages(_resize(torch.from_numpy(images), image_size), torch.tensor(labels), tuple(parts[0].classes))


def load_stl10(
    root: str | os.PathLike, split: str = "train", *, download: bool = False, image_size: int | None = None
) -> LabelledImages:
    """Load the labelled images of STL-10 (Coates et al. 2011): 5,000 for training and 8,000 for testing.

    Parameters
    ----------
    root : str or os.PathLike
        Folder that has ``stl10_binary``.
    split : {"train", "test", "all"}
        Which part.
    download : bool
        Whether to download the files (2.6 GB) if they are missing.
    image_size : int, optional
        Height and width in pixels, resized from 96 with antialiasing; 64 by default, as in papers on unlearning.

    Returns
    -------
    LabelledImages
        uint8 storage, (N, 3, image_size, image_size).

    Raises
    ------
    FileNotFoundError, ValueError, TypeError, ImportError
        As ``load_cifar10``.
    """
    _check(root, split, image_size)
    parts = [
        _open("STL-10", root, "stl10_binary", _torchvision().datasets.STL10, download, split=part)
        for part in _parts(split)
    ]
    images = torch.cat([_resize(torch.from_numpy(part.data), image_size or 64) for part in parts])
    labels = torch.cat([torch.from_numpy(part.labels.astype(np.int64)) for part in parts])
    return LabelledImages(images, labels, tuple(parts[0].classes))


def load_folder(path: str | os.PathLike, split: str = "all", *, image_size: int, seed: int = 0) -> LabelledImages:
    """Load a folder with a sub-folder of images for each class. Images are read on access.

    Parameters
    ----------
    path : str or os.PathLike
        A folder with a sub-folder for each class, or with ``train`` and ``test`` that have them. In the first case
        "train" is 80 % of each class and "test" the rest.
    split : {"train", "test", "all"}
        Which part.
    image_size : int
        Height and width in pixels: images are converted to RGB, the shorter side is resized with antialiasing, and the
        centre is cropped.
    seed : int
        Seed of the split.

    Returns
    -------
    LabelledImages
        (N, 3, image_size, image_size); classes are the sub-folders in alphabetical order.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or a class has no images.
    ValueError, TypeError
        If there are no class folders, ``train`` and ``test`` have different ones, or an argument is invalid; on access
        also if a file is not an image.
    """
    _check(path, split, image_size)
    if image_size is None:
        raise ValueError("image_size is None, expected height and width in pixels for a folder of images")
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; expected one with a sub-folder of images for each class")
    has_splits = all((path / part).is_dir() for part in ("train", "test"))
    folders = [_image_folder(path / part, image_size) for part in _parts(split)] if has_splits else []
    folders = folders or [_image_folder(path, image_size)]
    if any(folder.classes != folders[0].classes for folder in folders):
        raise ValueError(f"{path}/train and {path}/test have different class folders, expected the same")
    for name in folders[0].classes:
        check_utf8(f"{path} has a folder whose name", name)
    data = folders[0] if len(folders) == 1 else torch.utils.data.ConcatDataset(folders)
    labels = torch.tensor([label for folder in folders for label in folder.targets])
    images = LazyImages(data, (3, image_size, image_size))
    dataset = LabelledImages(images, labels, tuple(folders[0].classes))
    if has_splits or split == "all":
        return dataset
    return dataset.split(0.8, seed)[("train", "test").index(split)]


def _check(root: str | os.PathLike | None, split: str, image_size: int | None) -> None:
    check_choice("split", split, SPLITS)
    if root is None:
        raise ValueError("root is None, expected the folder of the data set's files")
    if image_size is not None:
        check_int("image_size", image_size, 1)


def _parts(split: str) -> tuple[str, ...]:
    return ("train", "test") if split == "all" else (split,)


def _open(name: str, root: str | os.PathLike, folder: str, dataset: type, download: bool, **options: Any) -> Any:
    """torchvision's data set. It checks the files' md5 and raises RuntimeError for missing and for damaged files."""
    path = Path(root) / folder
    try:
        return dataset(root, download=download, **options)
    except RuntimeError as error:
        if not path.is_dir():
            raise FileNotFoundError(
                f"{name} is not in {root}, which has no {folder}: pass its folder as root (--data_root), or "
                "download=True (--download) to fetch it"
            ) from error
        raise ValueError(
            f"{name} in {path} is incomplete or damaged: remove that folder and load once with "
            "download=True (--download)"
        ) from error


def _resize(images: Tensor, size: int | None) -> Tensor:
    """Resize uint8 (N, C, H, W) to uint8 (N, C, size, size), bilinear with antialiasing."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images.contiguous()
    resized = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8)
    for start in range(0, len(images), RESIZE_CHUNK):
        chunk = images[start : start + RESIZE_CHUNK].float()
        chunk = F.interpolate(chunk, size=(size, size), mode="bilinear", antialias=True)
        resized[start : start + RESIZE_CHUNK] = chunk.round().clamp(0, 255).to(torch.uint8)
    return resized


def _image_folder(path: Path, size: int) -> Any:
    torchvision = _torchvision()
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise ValueError(f"{path} has no sub-folders; expected one for each class, with its images inside")
    try:
        return torchvision.datasets.ImageFolder(path, transform=_Square(size), loader=load_rgb)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}; remove empty class folders or put images in them") from error


def load_rgb(path: str | os.PathLike) -> "Image":
    """Read an image file as 8 bits of RGB. ValueError, which names the file, if it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): remove or replace it") from error


def as_rgb(image: "Image") -> "Image":
    """Convert a PIL image to 8 bits of RGB. 16-bit values are scaled.

    PIL itself clips them at 255. ValueError for other depths, whose range is unknown.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # PIL reads grey PNGs of 16 bits as I;16 or, in earlier versions, as I.
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values are from {values.min():g} to {values.max():g}, expected 8 or 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "integers of 32 bits" if image.mode == "I" else "floats"
        raise ValueError(f"its values are {kind}, expected 8 or 16 bits")
    return image.convert("RGB")


class _Square:
    """Converts a PIL image to float32 (3, size, size) in [-1, 1]. A class, so that DataLoader workers can pickle it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: "Image") -> Tensor:
        from PIL import Image

        # Rounded up, so that the shorter side is not a pixel too short.
        scale = self.size / min(image.size)
        width, height = (max(self.size, math.ceil(side * scale - 1e-6)) for side in image.size)
        # PIL's filters antialias when they downsample.
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1
