"""CIFAR-10, STL-10 and folders of images, read through torchvision."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .digits import check_split
from .images import LabelledImages, LazyImages

# Images are resized so many at a time: in float32, all of STL-10 at once would take gigabytes.
RESIZE_CHUNK = 256


def _torchvision():
    try:
        import torchvision
    except ImportError as error:
        raise ImportError("CIFAR-10, STL-10 and folders need torchvision: pip install 'pecker-fast[demo]'") from error
    return torchvision


def load_cifar10(root, split: str = "train", *, download: bool = False, image_size: int | None = None):
    """CIFAR-10 (Krizhevsky 2009): 50,000 images for training and 10,000 for testing.

    Parameters
    ----------
    root: folder that holds ``cifar-10-batches-py``.
    split: "train", "test" or "all".
    download: whether to fetch the files (170 MB) where they are missing.
    image_size: height and width in pixels; None: the original 32.

    Returns
    -------
    LabelledImages: uint8 storage, (N, 3, image_size, image_size).

    Raises
    ------
    FileNotFoundError: the files are not there. ValueError: they are damaged, or an argument is wrong. ImportError:
    torchvision is missing.
    """
    _check(root, split, image_size)
    parts = [
        _open("CIFAR-10", root, "cifar-10-batches-py", _torchvision().datasets.CIFAR10, download, train=part == "train")
        for part in _parts(split)
    ]
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)
    labels = [label for part in parts for label in part.targets]
    return LabelledImages(_resize(torch.from_numpy(images), image_size), torch.tensor(labels), tuple(parts[0].classes))


def load_stl10(root, split: str = "train", *, download: bool = False, image_size: int | None = None):
    """STL-10 (Coates et al. 2011): 5,000 labelled images for training and 8,000 for testing; not the unlabelled ones.

    Parameters
    ----------
    root: folder that holds ``stl10_binary``.
    split: "train", "test" or "all".
    download: whether to fetch the files (2.6 GB) where they are missing.
    image_size: height and width in pixels, resized from 96 with antialiasing; None: 64, as unlearning papers use.

    Returns, Raises: as ``load_cifar10``.
    """
    _check(root, split, image_size)
    parts = [
        _open("STL-10", root, "stl10_binary", _torchvision().datasets.STL10, download, split=part)
        for part in _parts(split)
    ]
    images = torch.cat([_resize(torch.from_numpy(part.data), image_size or 64) for part in parts])
    labels = torch.cat([torch.from_numpy(part.labels.astype(np.int64)) for part in parts])
    return LabelledImages(images, labels, tuple(parts[0].classes))


def load_folder(path, split: str = "all", *, image_size: int, seed: int = 0) -> LabelledImages:
    """Images in one sub-folder a class, read when they are taken.

    Parameters
    ----------
    path: a folder with a sub-folder per class, or with ``train`` and ``test`` that have them. In the first case "train"
        is 80 % of each class and "test" the rest, split by ``seed``.
    split: "train", "test" or "all".
    image_size: height and width in pixels: the shorter side is resized to it with antialiasing, then the middle is cut
        out. Images become RGB.

    Returns
    -------
    LabelledImages: (N, 3, image_size, image_size); classes are the sub-folders in alphabetical order.

    Raises
    ------
    FileNotFoundError: no such folder, or a class without images. ValueError: no class folders, different ones in
    ``train`` and ``test``, or a wrong argument; when an image is taken, also a file that is no image.
    """
    _check(path, split, image_size)
    if image_size is None:
        raise ValueError("image_size is None, expected the pixels of a side for a folder of images")
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; expected one with a sub-folder of images for each class")
    ready = all((path / part).is_dir() for part in ("train", "test"))
    folders = [_image_folder(path / part, image_size) for part in _parts(split)] if ready else []
    folders = folders or [_image_folder(path, image_size)]
    if any(folder.classes != folders[0].classes for folder in folders):
        raise ValueError(f"{path}/train and {path}/test have different class folders, expected the same")
    data = folders[0] if len(folders) == 1 else torch.utils.data.ConcatDataset(folders)
    labels = torch.tensor([label for folder in folders for label in folder.targets])
    images = LazyImages(data, (3, image_size, image_size))
    dataset = LabelledImages(images, labels, tuple(folders[0].classes))
    if ready or split == "all":
        return dataset
    return dataset.split(0.8, seed)[("train", "test").index(split)]


def _check(root, split: str, image_size: int | None) -> None:
    check_split(split)
    if root is None:
        raise ValueError("root is None, expected the folder of the data set's files")
    whole = isinstance(image_size, int) and not isinstance(image_size, bool)
    if image_size is not None and not (whole and image_size >= 1):
        raise ValueError(f"image_size is {image_size!r}, expected a whole number of pixels, at least 1")


def _parts(split: str) -> tuple[str, ...]:
    return ("train", "test") if split == "all" else (split,)


def _open(name: str, root, folder: str, dataset, download: bool, **options):
    """torchvision's data set. It checks the files' sums and raises RuntimeError for missing and damaged ones alike."""
    path = Path(root) / folder
    try:
        return dataset(root, download=download, **options)
    except RuntimeError as error:
        if not path.is_dir():
            raise FileNotFoundError(
                f"{name} is not in {root} (no {folder} there): pass its folder as root (--data_root), or "
                "download=True (--download) to fetch it"
            ) from error
        raise ValueError(
            f"{name} in {path} is incomplete or damaged: remove that folder and load once with "
            "download=True (--download)"
        ) from error


def _resize(images: Tensor, size: int | None) -> Tensor:
    """uint8 (N, C, H, W) to uint8 (N, C, size, size), bilinear with antialiasing."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images.contiguous()
    out = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8)
    for start in range(0, len(images), RESIZE_CHUNK):
        chunk = images[start : start + RESIZE_CHUNK].float()
        chunk = F.interpolate(chunk, size=(size, size), mode="bilinear", antialias=True)
        out[start : start + RESIZE_CHUNK] = chunk.round().clamp(0, 255).to(torch.uint8)
    return out


def _image_folder(path: Path, size: int):
    torchvision = _torchvision()
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise ValueError(f"{path} has no sub-folders; expected one for each class, with its images inside")
    try:
        return torchvision.datasets.ImageFolder(path, transform=_Square(size), loader=_load_rgb)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}; remove empty class folders or put images in them") from error


def _load_rgb(path):
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): remove or replace it") from error


class _Square:
    """PIL image to float32 (3, size, size) in [-1, 1]. A class, so that DataLoader workers can pickle it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image) -> Tensor:
        from PIL import Image

        # Rounded up: the shorter side must not come out a pixel short.
        scale = self.size / min(image.size)
        width, height = (max(self.size, math.ceil(side * scale - 1e-6)) for side in image.size)
        # PIL's filters antialias when they shrink.
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.float() / 127.5 - 1
