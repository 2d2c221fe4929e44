"""The real images of a run, and the classifier that judges its samples."""

from collections.abc import Sequence

from torch import nn

from ...data import LabelledImages, load_dataset
from ...diffusion import num_classes
from ...metrics import Judge, load_judge
from ..arguments import DataArguments
from ..presets import class_preset


def load_images(data: DataArguments, preset_name: str, split: str, size: int) -> LabelledImages:
    """Load the real images of a preset, or those that ``data`` names, at ``size`` pixels.

    Raises
    ------
    ValueError
        If the folder with the files of CIFAR-10 or STL-10 is not given, or a data set does not exist.
    FileNotFoundError
        If there are no such files.
    """
    name = data.dataset_name or class_preset(preset_name).dataset
    if name in ("cifar10", "stl10") and data.data_root is None:
        raise ValueError(
            f"data_root is not given: expected the folder with the files of {name} (--download puts them there), "
            "or other images by --dataset_name folder:<path>"
        )
    return load_dataset(name, split, data.data_root, data.download, image_size=size)


def lacks_files(data: DataArguments, preset_name: str) -> str | None:
    """What images need that is not given or has not been downloaded, as a line; None if they can be loaded."""
    name = data.dataset_name or class_preset(preset_name).dataset
    if name not in ("cifar10", "stl10"):
        return None
    if data.data_root is None:
        return f"a run also needs data_root, the folder with the files of {name}"
    return f"the files of {name} are checked when the run has downloaded them" if data.download else None


def check_images(images: LabelledImages, network: nn.Module) -> None:
    """Check that images are such as ``network`` was trained on. ValueError if their shape or classes differ."""
    config = network.config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    if tuple(images.image_shape) != shape or images.num_classes != num_classes(network):
        raise ValueError(
            f"the training images have shape {tuple(images.image_shape)} in {images.num_classes} classes, the "
            f"pretrained network draws {shape} in {num_classes(network)}: expected the images that it was trained on "
            "(dataset_name, data_root)"
        )


def find_judge(preset_name: str, path: str | None) -> Judge | None:
    """The classifier in the file ``path``; by default the one of the preset, or None if it comes with none."""
    shipped = class_preset(preset_name).judge
    if path is None and shipped is None:
        return None
    return Judge.load(path) if path else load_judge(shipped)


def check_judge(
    judge: Judge, path: str | None, images: LabelledImages, dataset: str, classes: int, network: str = "the network"
) -> None:
    """Check that a classifier, real images and a network have the same classes.

    Parameters
    ----------
    judge : Judge
        The classifier.
    path : str or None
        Its file; None for the preset's.
    images : LabelledImages
        The real images.
    dataset : str
        Their name.
    classes : int
        Classes of the network.
    network : str
        What the network is called in the message.

    Raises
    ------
    ValueError
        If they differ; the message names all of them.
    """
    name = "the preset's judge" if path is None else f"judge {path}"
    if judge.num_classes != classes:
        raise ValueError(
            f"{name} has {judge.num_classes} classes ({_few(judge.class_names)}), {network} has {classes}: expected a "
            "judge of the same classes (pecker-fast train-classifier makes one)"
        )
    if tuple(judge.class_names) != tuple(images.class_names):
        raise ValueError(
            f"{name} has the classes {_few(judge.class_names)}, but dataset_name {dataset} has "
            f"{_few(images.class_names)}: expected the images that the judge knows, or another judge"
        )


def _few(names: Sequence[str]) -> str:
    """Names to read, the first ones of many."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def cover_of(value: str | int | None) -> int | None:
    """A cover class as a number; None for "random".

    Raises
    ------
    ValueError
        If it is neither a number nor "random".
    """
    if value == "random" or value is None:
        return None
    if not str(value).isdecimal():
        raise ValueError(f'cover_class is {value!r}, expected a class or "random"')
    return int(value)
