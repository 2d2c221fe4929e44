"""CIFAR-10, STL-10 and folders of images, read through torchvision."""

import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..checks import check_choice, check_int, check_utf8
from .digits import SPLITS
from .images import LabelledImages, LazyImages

if TYPE_CHECKING:
    from PIL.Image import Image

# Images resized at a time: all of STL-10 in float32 would take gigabytes.
RESIZE_CHUNK = 256
# Pillow's modes of grey pictures, but for those of 16 bits, whose names have suffixes.
GREY = ("1", "L", "LA", "La", "I", "F")
# Bytes of pixels up to which the pictures of a folder are kept in memory.
MEMORY = 2**30


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


def load_folder(
    path: str | os.PathLike, split: str = "all", *, image_size: int, channels: int = 3, seed: int = 0
) -> LabelledImages:
    """Load a folder with a sub-folder of images for each class. Images are read on access.

    Parameters
    ----------
    path : str or os.PathLike
        A folder with a sub-folder for each class, or with ``train`` and ``test`` that have them. In the first case
        "train" is 80 % of each class and "test" the rest.
    split : {"train", "test", "all"}
        Which part.
    image_size : int
        Height and width in pixels: the shorter side is resized with antialiasing, and the centre is cropped.
    channels : {1, 3}
        Whether images are converted to grey or to RGB. ``survey_folder`` says what they are.
    seed : int
        Seed of the split.

    Returns
    -------
    LabelledImages
        (N, channels, image_size, image_size); classes are the sub-folders in alphabetical order, with their names in
        Unicode's composed form (NFC).

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
    check_choice("channels", channels, (1, 3))
    path = _existing(path)
    has_splits = _has_splits(path)
    parts = [path / part for part in _parts(split)] if has_splits else [path]
    load, square = partial(_load, channels=channels), _Square(image_size)
    folders = [_image_folder(part, square, load) for part in parts]
    _check_same_classes(path, folders)
    data = folders[0] if len(folders) == 1 else torch.utils.data.ConcatDataset(folders)
    labels = torch.tensor([label for folder in folders for label in folder.targets])
    images = LazyImages(data, (channels, image_size, image_size))
    dataset = LabelledImages(images, labels, class_names_of(path, folders[0].classes))
    if has_splits or split == "all":
        return dataset
    return dataset.split(0.8, seed)[("train", "test").index(split)]


@dataclass(frozen=True)
class FolderSurvey:
    """What a folder of pictures has, from the files' headers.

    Attributes
    ----------
    class_names : tuple of str
        As ``load_folder`` has them.
    grey, colour : int
        Number of pictures of either kind.
    grey_file, colour_file : str or None
        One of them.
    shortest : int
        The shortest side of a picture, in pixels.
    shortest_file : str
        Of this picture.
    """

    class_names: tuple[str, ...]
    grey: int
    colour: int
    grey_file: str | None
    colour_file: str | None
    shortest: int
    shortest_file: str


def survey_folder(path: str | os.PathLike) -> FolderSurvey:
    """Look at all pictures of a folder that ``load_folder`` reads. Only their headers are read.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or a class has no images.
    ValueError
        If there are fewer than two class folders, ``train`` and ``test`` have different ones, or a file is not an
        image.
    """
    path = _existing(path)
    parts = [path / part for part in _parts("all")] if _has_splits(path) else [path]
    folders = [_image_folder(part, None, _header) for part in parts]
    _check_same_classes(path, folders)
    names = class_names_of(path, folders[0].classes)
    if len(names) < 2:
        raise ValueError(f"{path} has one class folder, {names[0]!r}, expected at least two: one for each class")
    shortest, shortest_file, files = math.inf, "", {True: [], False: []}
    for file, _ in _shown([sample for folder in folders for sample in folder.samples]):
        mode, side = _header(file)
        files[mode in GREY or mode.startswith("I;16")].append(file)
        if side < shortest:
            shortest, shortest_file = side, file
    grey, colour = files[True], files[False]
    first = next(iter(grey), None), next(iter(colour), None)
    return FolderSurvey(names, len(grey), len(colour), *first, int(shortest), shortest_file)


def class_names_of(path: Path, folders: list[str]) -> tuple[str, ...]:
    """The names of classes, from those of their folders. ValueError if one is not UTF-8, or two look alike."""
    for name in folders:
        check_utf8(f"{path} has a folder whose name", name)
    # macOS decomposes the names of files.
    names = tuple(unicodedata.normalize("NFC", name) for name in folders)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} has two class folders whose names look alike, {twice!r}: rename one")
    return names


def in_memory(dataset: LabelledImages, limit: int = MEMORY) -> LabelledImages:
    """Read all images of a folder into memory, as uint8 if that is exact.

    Returns
    -------
    LabelledImages
        The same images; ``dataset`` itself if they would take more than ``limit`` bytes, or have more than 8 bits.

    Raises
    ------
    ValueError
        If a file is not an image.
    """
    if not isinstance(dataset.images, LazyImages) or len(dataset) * math.prod(dataset.image_shape) > limit:
        return dataset
    pixels = torch.empty((len(dataset), *dataset.image_shape), dtype=torch.uint8)
    for i in _shown(range(len(dataset))):
        image = dataset.images[i]
        pixels[i] = ((image + 1) * 127.5).round().to(torch.uint8)
        if not torch.equal(pixels[i].float() / 127.5 - 1, image):
            return dataset
    return LabelledImages(pixels, dataset.labels, dataset.class_names)


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


def _shown(items: Sequence[Any]) -> Iterable[Any]:
    """``items`` with a progress bar on a terminal, if going through them takes longer than two seconds."""
    return tqdm(items, desc="pictures", unit="picture", delay=2, leave=False, disable=None)


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; expected one with a sub-folder of images for each class")
    return path


def _has_splits(path: Path) -> bool:
    return all((path / part).is_dir() for part in ("train", "test"))


def _check_same_classes(path: Path, folders: list[Any]) -> None:
    if any(folder.classes != folders[0].classes for folder in folders):
        raise ValueError(f"{path}/train and {path}/test have different class folders, expected the same")


def _image_folder(path: Path, transform: Callable | None, loader: Callable) -> Any:
    torchvision = _torchvision()
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise ValueError(f"{path} has no sub-folders; expected one for each class, with its images inside")
    try:
        return torchvision.datasets.ImageFolder(path, transform=transform, loader=loader)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}; remove empty class folders or put images in them") from error


def _load(path: str, channels: int) -> "Image":
    image = load_rgb(path)
    # Exact for a picture that was grey.
    return image.convert("L") if channels == 1 else image


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator["Image"]:
    """An image file while it is open. ValueError, which names the file, if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): remove or replace it") from error


def load_rgb(path: str | os.PathLike) -> "Image":
    """Read an image file as 8 bits of RGB. ValueError, which names the file, if it cannot be read."""
    with _opened(path) as image:
        return as_rgb(image)


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


def _header(path: str) -> tuple[str, int]:
    """Pillow's mode of a picture, and its shorter side in pixels."""
    with _opened(path) as image:
        return image.mode, min(image.size)


class _Square:
    """Converts a PIL image to float32 (C, size, size) in [-1, 1]. A class, so that DataLoader workers can pickle it."""

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
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return pixels.float() / 127.5 - 1
