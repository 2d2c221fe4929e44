"""Training the classifier that the results of a preset are judged by."""

import math
from pathlib import Path

import torch

from ..metrics import Judge, train_digits_judge, train_mnist_judge, train_resnet
from .arguments import DataArguments, check_output, check_unused, device_of
from .classes.data import load_images
from .presets import class_preset

# STL-10 is judged on a split of all its labelled images, as in the public code.
# Data sets whose classifier comes with the package, and is trained by a recipe of its own.
SMALL = ("digits", "mnist")
STL10_SHARE, STL10_SEED = 12 / 13, 1234


def train_classifier(
    preset: str = "cifar10",
    dataset_name: str | None = None,
    data_root: str | None = None,
    download: bool = False,
    imagenet_weights: str | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    resize: int = 224,
    device: str | None = None,
    seed: int = 0,
    output: str | None = None,
    progress_bar: bool = True,
) -> tuple[Judge, Path]:
    """Train the classifier of a preset, for --judge of unlearn, evaluate and compare.

    cifar10, stl10 and folders: ResNet-34 at 224 pixels, 10 epochs of Adam. digits, digits16, mnist: the small
    network that comes with the package, trained again.

    Parameters
    ----------
    preset : str
        cifar10, stl10, digits, digits16 or mnist.
    dataset_name : str, optional
        cifar10, stl10 or folder:<path>. Default: the preset's.
    data_root : str, optional
        Folder with the files of cifar10 or stl10.
    download : bool
        Download the files if they are missing.
    imagenet_weights : str, optional
        torchvision's resnet34-b627a593.pth to start from, as published. Default: random weights.
    epochs : int
        Passes over the images.
    batch_size : int
        Images in a step.
    learning_rate : float, optional
        Of the body. Default: 1e-5 with ImageNet's weights, 1e-3 without.
    head_learning_rate : float, optional
        Of the last layer. Default: 1e-4 with ImageNet's weights, 1e-3 without.
    resize : int
        Height and width of the network's input.
    device : str, optional
        cpu, cuda, cuda:1, ... Default: a GPU if there is one.
    seed : int
        Seed of everything random.
    output : str, optional
        The file. Default: runs/<preset>-judge.safetensors.
    progress_bar : bool
        Show a progress bar.

    Returns
    -------
    tuple of Judge and Path
        The classifier, and its file.

    Raises
    ------
    ValueError, FileNotFoundError
        If an option is wrong, or the images are missing.
    """
    given, values = locals(), class_preset(preset)
    target = Path(output or f"runs/{preset}-judge.safetensors")
    if output is not None:
        check_output(output)
    elif target.exists():
        raise ValueError(f"output is not given, and {target} exists already: expected the file to write")
    small = dataset_name in (None, values.dataset)
    if small and values.dataset in SMALL:
        why = f"the classifier of {preset} has one recipe"
        check_unused(train_classifier, given, given.keys() - {"preset", "dataset_name", "output", "progress_bar"}, why)
    if values.dataset == "digits" and dataset_name in (None, "digits"):
        judge = train_digits_judge(values.unet.sample_size)
    elif values.dataset == "mnist" and dataset_name in (None, "mnist"):
        judge = train_mnist_judge()
    else:
        place = device_of(device)
        data, size = DataArguments(dataset_name, data_root, download), values.unet.sample_size
        name = dataset_name or values.dataset
        if name == "stl10":
            train, test = load_images(data, preset, "all", size).split(STL10_SHARE, STL10_SEED)
        else:
            train, test = (load_images(data, preset, split, size) for split in ("train", "test"))
        recipe = {
            "imagenet": imagenet_weights is not None,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "head_learning_rate": head_learning_rate,
            "resize": resize,
            "seed": seed,
        }
        options = {**recipe, "imagenet_weights": imagenet_weights, "device": place, "progress": progress_bar}
        del options["imagenet"]
        model, recognised = train_resnet(train, test, **options)
        measured = [share for share in recognised if not math.isnan(share)]
        counts = torch.bincount(test.labels, minlength=test.num_classes).tolist()
        accuracy = sum(share * n for share, n in zip(recognised, counts, strict=True) if n) / max(1, sum(counts))
        for label, share in zip(test.class_names, recognised, strict=True):
            print(f"{label:16}{share:8.1%}")
        recipe |= {"dataset": name, "train_images": len(train), "test_images": len(test), "worst_class": min(measured)}
        judge = Judge(model, train.class_names, name=f"resnet34-{name.split(':')[0]}", accuracy=accuracy, recipe=recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    judge.save(target)
    return judge, target
