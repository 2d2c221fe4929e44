"""LabelledImages: the images of a data set with their classes, selection of classes, and stratified splits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number


class LazyImages:
    """Images read one at a time from a map-style data set such as torchvision's.

    Parameters
    ----------
    dataset : Dataset
        ``dataset[i]`` is a tuple whose first entry is a float32 tensor (C, H, W) in [-1, 1].
    shape : sequence of int
        (C, H, W).
    indices : Tensor, optional
        int64 (N,), the images of ``dataset`` to use, in this order; all by default.
    """

    def __init__(self, dataset: Any, shape: Sequence[int], indices: Tensor | None = None) -> None:
        self.dataset = dataset
        self.shape = tuple(shape)
        self.indices = torch.arange(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        image = self.dataset[int(self.indices[index])][0]
        if image.dtype != torch.float32 or tuple(image.shape) != self.shape:
            raise ValueError(
                f"image {index} is {image.dtype} of shape {tuple(image.shape)}, expected float32 of {self.shape}"
            )
        return image

    def subset(self, indices: Tensor) -> "LazyImages":
        return LazyImages(self.dataset, self.shape, self.indices[indices])


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with a class each. ``batch`` and indexing return float32 in [-1, 1], whatever the storage.

    Parameters
    ----------
    images : Tensor or LazyImages
        float32 (N, C, H, W) in [-1, 1]; uint8 (N, C, H, W), a quarter of the memory, with 0 to 255 converted to [-1, 1]
        on access; or LazyImages, read from files on access.
    labels : Tensor
        int64 (N,), from 0 to len(class_names) - 1.
    class_names : tuple of str
        A name for each class. Selecting classes keeps all names, so that a label always means the same class.

    Raises
    ------
    TypeError, ValueError
        If images or labels have another type, shape or range.
    """

    images: Tensor | LazyImages
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        check_labels(self.labels, len(self.class_names))
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"labels has {len(self.labels)} entries, expected one for each of {len(self.images)} images"
            )
        if isinstance(self.images, Tensor):
            if self.images.dtype is torch.float32:
                check_images(self.images)
            elif self.images.dtype is not torch.uint8 or self.images.ndim != 4:
                raise TypeError(
                    f"images is {self.images.dtype} of shape {tuple(self.images.shape)}, "
                    "expected float32 or uint8 of shape (N, C, H, W)"
                )
        elif not isinstance(self.images, LazyImages):
            raise TypeError(f"images is {type(self.images).__name__}, expected a tensor or LazyImages")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image float32 (C, H, W) in [-1, 1] and its label, as torch's DataLoader requires."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index is {index}, expected one of {len(self)} images")
        return self.batch(torch.tensor([index % len(self)]))[0], int(self.labels[index])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.images.shape if isinstance(self.images, LazyImages) else self.images.shape[1:])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def batch(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``, int64 (n,), as float32 (n, C, H, W) in [-1, 1]."""
        if isinstance(self.images, LazyImages):
            if len(indices) == 0:
                return torch.zeros((0, *self.image_shape))
            return torch.stack([self.images[int(i)] for i in indices])
        images = self.images[indices]
        return images if images.dtype is torch.float32 else images.float() / 127.5 - 1

    def tensor(self) -> Tensor:
        """Return all images as float32 (N, C, H, W) in [-1, 1], without a copy if they are stored so."""
        if isinstance(self.images, Tensor) and self.images.dtype is torch.float32:
            return self.images
        return self.batch(torch.arange(len(self)))

    def subset(self, indices: Tensor) -> "LabelledImages":
        """Select the images at ``indices``, int64 (n,), in that order."""
        lazy = isinstance(self.images, LazyImages)
        images = self.images.subset(indices) if lazy else self.images[indices]
        return LabelledImages(images, self.labels[indices], self.class_names)

    def of_classes(self, keep: Iterable[int]) -> "LabelledImages":
        """Select the images of the classes ``keep``, in their order and with the same labels and names.

        Raises
        ------
        ValueError, TypeError
            If ``keep`` is empty or has something that is not a class.
        """
        keep = check_classes("keep", keep, self.num_classes)
        if not keep:
            raise ValueError("keep is empty, expected at least one class")
        return self.subset(torch.isin(self.labels, torch.tensor(keep)).nonzero().flatten())

    def split(self, share: float = 0.8, seed: int = 0) -> tuple["LabelledImages", "LabelledImages"]:
        """Split into two parts. The first has ``share`` of each class, rounded. Deterministic for a seed.

        Raises
        ------
        ValueError, TypeError
            If ``share`` is not in (0, 1).
        """
        check_number("share", share, 0, 1, open_low=True, open_high=True)
        generator = torch.Generator().manual_seed(seed)
        first = torch.zeros(len(self), dtype=torch.bool)
        for label in range(self.num_classes):
            members = (self.labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=generator)
            first[members[order[: round(share * len(members))]]] = True
        return self.subset(first.nonzero().flatten()), self.subset((~first).nonzero().flatten())


def check_images(images: Tensor, name: str = "images") -> None:
    """Raise TypeError or ValueError unless ``images`` is float32 (N, C, H, W) in [-1, 1]."""
    if not isinstance(images, Tensor) or images.dtype is not torch.float32:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} is {kind}, expected a float32 tensor")
    if images.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(images.shape)}, expected (N, C, H, W)")
    if images.numel():
        low, high = (x.item() for x in images.aminmax())
        # Written so that NaN fails too.
        if not (low >= -1 and high <= 1):
            raise ValueError(f"{name} has values from {low} to {high}, expected [-1, 1]")


def check_labels(labels: Tensor, num_classes: int, name: str = "labels") -> None:
    """Raise TypeError or ValueError unless ``labels`` is int64 (N,) with classes from 0 to num_classes - 1."""
    if not isinstance(labels, Tensor) or labels.dtype is not torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} is {kind}, expected an int64 tensor")
    if labels.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, expected (N,)")
    if len(labels):
        low, high = (x.item() for x in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} has classes from {low} to {high}, expected 0 to {num_classes - 1}")


def check_classes(name: str, classes: Iterable[int], num_classes: int) -> tuple[int, ...]:
    """Sort ``classes`` and remove repeats. TypeError or ValueError if one is not a class."""
    if isinstance(classes, int | str):
        raise TypeError(f"{name} is {classes!r}, expected several classes: [{classes!r}]")
    classes = list(classes)
    for value in classes:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} has {value!r}, expected integers")
        if not 0 <= value < num_classes:
            raise ValueError(f"{name} has class {value}, expected 0 to {num_classes - 1}")
    return tuple(sorted(set(classes)))
