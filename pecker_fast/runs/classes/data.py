"""The real images of a run, and the classifier that judges its samples; whether they fit each other and the network."""

from pathlib import Path

from torch import nn

from ...data import LabelledImages, check_dataset, folder_of, in_memory, load_dataset, survey_folder
from ...diffusion import class_names, num_classes
from ...metrics import Judge, load_judge
from ..arguments import DataArguments
from ..presets import class_preset
from ..presets.images import LEAST, size_for
from .names import listed

OWN_IMAGES = "expected a folder with a sub-folder of images for each class (--dataset_name folder:<path>)"


def dataset_of(data: DataArguments, preset_name: str) -> str:
    """The name of the data set, for messages too. ValueError if it is not given, and the preset has none."""
    name = data.dataset_name or class_preset(preset_name).dataset
    if name is None:
        raise ValueError(f"dataset_name is not given, and the preset {preset_name} has no data set: {OWN_IMAGES}")
    return name


def load_images(data: DataArguments, preset_name: str, split: str, size: int, channels: int) -> LabelledImages:
    """Load the real images of a preset, or those that ``data`` names, at ``size`` pixels.

    All pictures of a folder are read, so that one that cannot be read is found before a run begins. They are converted
    to grey or RGB, as ``channels`` says.

    Raises
    ------
    ValueError
        If the folder with the files of CIFAR-10 or STL-10 is not given, a data set does not exist, or a file is not an
        image.
    FileNotFoundError
        If there are no such files.
    """
    name = check_dataset("dataset_name", dataset_of(data, preset_name))
    folder = folder_of(name)
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"dataset_name is {name!r}, but {folder} is not a folder: {OWN_IMAGES}")
    if name in ("cifar10", "stl10") and data.data_root is None:
        raise ValueError(
            f"data_root is not given: expected the folder with the files of {name} (--download puts them there), "
            "or other images by --dataset_name folder:<path>"
        )
    channels = channels if channels in (1, 3) else 3
    return in_memory(load_dataset(name, split, data.data_root, data.download, image_size=size, channels=channels))


def lacks_files(data: DataArguments, preset_name: str) -> str | None:
    """What images need that is not given or has not been downloaded, as a line; None if they can be loaded."""
    name = data.dataset_name or class_preset(preset_name).dataset
    if name is None:
        return f"a run also needs dataset_name: {OWN_IMAGES}"
    if name not in ("cifar10", "stl10"):
        return None
    if data.data_root is None:
        return f"a run also needs data_root, the folder with the files of {name}"
    return f"the files of {name} are checked when the run has downloaded them" if data.download else None


def shape_of(dataset: str, size: int | None, channels: int | None) -> tuple[int, int, tuple[str, ...]]:
    """The size and the channels to use the pictures of a folder with, and the names of their classes.

    Parameters
    ----------
    dataset : str
        "folder:<path>".
    size, channels : int, optional
        What is set by the user.

    Raises
    ------
    ValueError, FileNotFoundError
        If it is no folder of pictures, they are too small, or some are grey and others are not.
    """
    folder = survey_folder(folder_of(dataset))
    if size is None and folder.shortest < LEAST:
        raise ValueError(
            f"{folder.shortest_file} has a side of {folder.shortest} pixels, expected at least {LEAST}: remove it, or "
            "set --sample_size"
        )
    if channels is None and folder.grey and folder.colour:
        raise ValueError(
            f"{dataset} has {folder.grey} grey pictures, such as {folder.grey_file}, and {folder.colour} others, such "
            f"as {folder.colour_file}: set --in_channels 3 to use all in colour, or 1 to use all in grey"
        )
    return size or size_for(folder.shortest), channels or (3 if folder.colour else 1), folder.class_names


def check_images(
    images: LabelledImages, dataset: str, network: nn.Module, owner: str = "the pretrained network"
) -> None:
    """Check that images are such as ``network`` was trained on.

    Parameters
    ----------
    images : LabelledImages
        The images.
    dataset : str
        Their data set, for messages.
    network : nn.Module
        A class-conditional network.
    owner : str
        What it is, for messages.

    Raises
    ------
    ValueError
        If their shape or their classes are others.
    """
    config = network.config
    shape, count = (config["in_channels"], config["sample_size"], config["sample_size"]), num_classes(network)
    if tuple(images.image_shape) != shape:
        raise ValueError(
            f"{dataset} has {_shape(images.image_shape)}, {owner} draws {_shape(shape)}: expected the images that it "
            "was trained on (dataset_name, data_root)"
        )
    names = class_names(network)
    if images.num_classes != count or (names and names != images.class_names):
        raise ValueError(
            f"{dataset} has {_classes(images.class_names)}, {owner} {_classes(names, count)}: expected the images that "
            "it was trained on (dataset_name, data_root)"
        )


def check_counts(images: LabelledImages, dataset: str, least: int, purpose: str) -> None:
    """Raise ValueError unless there are at least so many images of each class; ``purpose``: what for."""
    counts = images.labels.bincount(minlength=images.num_classes).tolist()
    fewest = min(range(len(counts)), key=counts.__getitem__)
    if counts[fewest] < least:
        raise ValueError(
            f"{dataset} has {counts[fewest]} images of the class {images.class_names[fewest]!r} {purpose}, expected at "
            f"least {least} of every class: add some, or remove its folder"
        )


def find_judge(preset_name: str, path: str | None) -> Judge | None:
    """The classifier in the file ``path``; by default the one of the preset, or None if it comes with none."""
    shipped = class_preset(preset_name).judge
    if path is None and shipped is None:
        return None
    return Judge.load(path) if path else load_judge(shipped)


def check_judge(judge: Judge, path: str | None, images: LabelledImages, dataset: str) -> None:
    """Check that a judge knows the classes of the images that it is to be used with, in the same order, and their size.

    Parameters
    ----------
    judge : Judge
        The judge.
    path : str or None
        Its file, for messages; None for that of a preset.
    images : LabelledImages
        Real images.
    dataset : str
        Their data set, for messages.

    Raises
    ------
    ValueError
        If they differ.
    """
    name = f"judge {path}" if path else f"the judge {judge.name} of the preset"
    folder = folder_of(dataset)
    train = f"train one for them with pecker-fast train-classifier --preset images --dataset_name {dataset}"
    fix = train if folder is not None and Path(folder).is_dir() else "expected a judge of these images (--judge)"
    if judge.class_names != images.class_names:
        same = sorted(judge.class_names) == sorted(images.class_names)
        raise ValueError(
            f"{name} knows {_classes(judge.class_names)}, {dataset} has {_classes(images.class_names)}"
            f"{', in another order' if same else ''}: {fix}"
        )
    config = judge.model.config
    shape = (config["channels"], config["image_size"], config["image_size"])
    if shape != tuple(images.image_shape):
        size, channels = images.image_shape[1], images.image_shape[0]
        options = f" --sample_size {size} --in_channels {channels}" if fix == train else ""
        raise ValueError(
            f"{name} is for {_shape(shape)}, {dataset} is used with {_shape(images.image_shape)}: {fix}{options}"
        )


def _shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    return f"{kind} images of {height} x {width} pixels"


def _classes(names: tuple[str, ...], count: int | None = None) -> str:
    return f"{count} classes" if not names else f"the {len(names)} classes {listed(names)}"
