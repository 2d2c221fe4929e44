"""The real images of a run, and the classifier that judges its samples."""

from torch import nn

from ...data import LabelledImages, load_dataset
from ...diffusion import num_classes
from ...metrics import Judge, load_judge
from ..arguments import DataArguments
from ..presets import class_preset

# Classes of ImageNet.
IMAGENET = 1000


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
    if name == "imagenet":
        raise ValueError(
            "dataset_name is not given, and the images of ImageNet are not downloaded: expected folder:<path>, with a "
            "subfolder for each class in the order of the labels"
        )
    if name in ("cifar10", "stl10") and data.data_root is None:
        raise ValueError(
            f"data_root is not given: expected the folder with the files of {name} (--download puts them there), "
            "or other images by --dataset_name folder:<path>"
        )
    return load_dataset(name, split, data.data_root, data.download, image_size=size)


def class_names(preset_name: str, count: int) -> list[str]:
    """Names of a network's classes by index: ImageNet's if the preset is for it, otherwise their numbers."""
    if class_preset(preset_name).dataset == "imagenet" and count == IMAGENET:
        try:
            from torchvision.models import ResNet50_Weights

            return list(ResNet50_Weights.DEFAULT.meta["categories"])
        except ImportError:
            pass
    return [f"class {label}" for label in range(count)]


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
