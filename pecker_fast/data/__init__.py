"""Data sets: images with classes, by name."""

from .digits import load_digits_images
from .images import LabelledImages, LazyImages
from .prompts import (
    EvaluationPrompts,
    PromptPairs,
    concept_pairs,
    default_cover,
    evaluation_prompts,
    keyword_pairs,
    load_prompts,
    negative_text,
    override,
    training_prompts,
)
from .vision import load_cifar10, load_folder, load_stl10

DATASETS = ("digits", "cifar10", "stl10", "folder:<path>")


def load_dataset(
    name: str,
    split: str = "train",
    root=None,
    download: bool = False,
    image_size: int | None = None,
) -> LabelledImages:
    """A data set by name.

    Parameters
    ----------
    name: "digits", "cifar10", "stl10" or "folder:<path>".
    split: "train", "test" or "all".
    root: folder of the files of "cifar10" and "stl10"; the others take none.
    download: whether "cifar10" and "stl10" may be fetched. Nothing is downloaded unless it is asked for.
    image_size: height and width in pixels. None: 8 for "digits" (more are made of these), 32 for "cifar10", 64 for
        "stl10"; a folder needs it.

    Returns
    -------
    LabelledImages with images in [-1, 1].

    Raises
    ------
    ValueError: an unknown name, or an argument that does not fit it. FileNotFoundError: the files are missing.
    ImportError: scikit-learn or torchvision is missing.
    """
    if name in ("cifar10", "stl10"):
        load = load_cifar10 if name == "cifar10" else load_stl10
        return load(root, split, download=download, image_size=image_size)
    path = name.removeprefix("folder:") if isinstance(name, str) else ""
    if name != "digits" and (path == name or not path):
        raise ValueError(f"name is {name!r}, expected one of {', '.join(DATASETS)}")
    if root is not None:
        raise ValueError(f"root is {str(root)!r}, but {name!r} takes none")
    if name == "digits":
        return load_digits_images(split, image_size=image_size)
    return load_folder(path, split, image_size=image_size)


__all__ = [
    "DATASETS",
    "EvaluationPrompts",
    "LabelledImages",
    "LazyImages",
    "PromptPairs",
    "concept_pairs",
    "default_cover",
    "evaluation_prompts",
    "keyword_pairs",
    "load_cifar10",
    "load_dataset",
    "load_digits_images",
    "load_folder",
    "load_prompts",
    "load_stl10",
    "negative_text",
    "override",
    "training_prompts",
]
