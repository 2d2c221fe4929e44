"""Training the classifier that the results of a preset are judged by."""

import math
from pathlib import Path
from typing import Any, Literal

import torch

from ..checks import check_int, check_number
from ..data import LabelledImages, folder_of
from ..metrics import DIGITS_RECIPE, Judge, train_digits_judge, train_mnist_judge, train_resnet
from ..metrics import train_classifier as train_small
from .arguments import DataArguments, check_output, check_unused, device_of
from .classes.data import check_counts, dataset_of, load_images, shape_of
from .presets import class_preset

# STL-10 is judged on a split of all its labelled images, as in the public code.
STL10_SHARE, STL10_SEED = 12 / 13, 1234
# Data sets whose classifier comes with the package.
SHIPPED = {"digits": train_digits_judge, "mnist": lambda size: train_mnist_judge()}
# The largest images of one's own, in pixels, that are judged by the small network.
SMALL_IMAGES = 32
# The small network on one's own images; pixels are shifted by a sixteenth of the side.
SMALL_RECIPE = {**DIGITS_RECIPE, "steps": 800, "lr": 4e-3}
# Options that the small network does not have.
RESNET_OPTIONS = ("imagenet_weights", "head_learning_rate", "resize", "device")
# How ResNet-34 is trained by default.
RESNET_RECIPE = {"epochs": 10, "batch_size": 128, "resize": 224, "seed": 0}


def train_classifier(
    preset: str = "cifar10",
    dataset_name: str | None = None,
    data_root: str | None = None,
    download: bool = False,
    sample_size: int | None = None,
    in_channels: int | None = None,
    network: Literal["auto", "small", "resnet34"] = "auto",
    imagenet_weights: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    resize: int | None = None,
    device: str | None = None,
    seed: int | None = None,
    output: str | None = None,
    progress_bar: bool = True,
) -> tuple[Judge, Path]:
    """Train the classifier of a preset, for --judge of pretrain, unlearn, evaluate and compare.

    cifar10, stl10: ResNet-34 at 224 pixels, 10 epochs of Adam. images, your own (--dataset_name folder:PATH): a small
    network up to 32 pixels, and ResNet-34 for larger ones. digits, digits16, mnist: the small network that comes with
    the package, trained again.

    Parameters
    ----------
    preset : str
        cifar10, stl10, images, digits, digits16 or mnist.
    dataset_name : str, optional
        cifar10, stl10 or folder:<path>. Default: the preset's.
    data_root : str, optional
        Folder with the files of cifar10 or stl10.
    download : bool
        Download the files if they are missing.
    sample_size : int, optional
        Height and width of the images, which the network to be judged draws. Default: the preset's; of images, what
        pretrain takes: the shortest side of a picture, rounded down to a multiple of 4, but at most 32.
    in_channels : int, optional
        1 to use the pictures of a folder in grey, 3 in RGB. Default: what they are.
    network : {"auto", "small", "resnet34"}
        The classifier. auto: as above.
    imagenet_weights : str, optional
        torchvision's resnet34-b627a593.pth to start from, as published. Default: random weights.
    epochs : int, optional
        Passes over the images. Default: 10; for the small network as many as 800 steps are.
    batch_size : int, optional
        Images in a step. Default: 128; for the small network 64.
    learning_rate : float, optional
        Of the body. Default: 1e-5 with ImageNet's weights, 1e-3 without; for the small network 4e-3 for all of it.
    head_learning_rate : float, optional
        Of the last layer. Default: 1e-4 with ImageNet's weights, 1e-3 without.
    resize : int, optional
        Height and width of the ResNet's input. Default: 224.
    device : str, optional
        cpu, cuda, cuda:1, ... Default: a GPU if there is one; the small network trains on the CPU.
    seed : int, optional
        Seed of everything random. Default: 0.
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
        If an option is wrong or would not be used, or the images are missing, before anything is trained.
    """
    options: dict[str, Any] = {"imagenet_weights": imagenet_weights, "epochs": epochs, "batch_size": batch_size}
    options |= {"learning_rate": learning_rate, "head_learning_rate": head_learning_rate, "resize": resize}
    options |= {"device": device, "seed": seed}
    for option in ("epochs", "batch_size", "resize"):
        if options[option] is not None:
            check_int(option, options[option], 1)
    if seed is not None:
        check_int("seed", seed, 0)
    for option in ("learning_rate", "head_learning_rate"):
        if options[option] is not None:
            check_number(option, options[option], open_low=True)
    values = class_preset(preset)
    target = Path(output or f"runs/{preset}-judge.safetensors")
    if output is not None:
        check_output(output, ".safetensors", "a judge", Judge.load)
    elif target.exists():
        raise ValueError(f"output is not given, and {target} exists already: expected the file to write")
    data = DataArguments(dataset_name, data_root, download)
    name = dataset_of(data, preset)
    if name in SHIPPED and name == values.dataset:
        options |= {"sample_size": sample_size, "in_channels": in_channels}
        if network != "small":
            options["network"] = network
        check_unused(train_classifier, options, options, f"the classifier of {preset} has one recipe")
        judge = SHIPPED[name](values.unet.sample_size)
    else:
        size, channels = sample_size or values.unet.sample_size, in_channels or 3
        if values.dataset is None and folder_of(name) is not None:
            size, channels, _ = shape_of(name, sample_size, in_channels)
        kind = network
        if kind == "auto":
            kind = "small" if values.dataset is None and (size <= SMALL_IMAGES or channels == 1) else "resnet34"
        if kind == "small":
            why = f"the small network for {size} pixels has no such option (--network resnet34 has)"
            check_unused(train_classifier, options, RESNET_OPTIONS, why)
        if name == "stl10":
            train, test = load_images(data, preset, "all", size, channels).split(STL10_SHARE, STL10_SEED)
        else:
            train, test = (load_images(data, preset, split, size, channels) for split in ("train", "test"))
        # A judge that has not seen a class, or was not tested on it, says nothing about it.
        for images, least, purpose in ((train, 2, "to train on"), (test, 1, "to test with")):
            check_counts(images, name, least, purpose)
        judge = (_small if kind == "small" else _resnet)(train, test, options, name, progress_bar)
    target.parent.mkdir(parents=True, exist_ok=True)
    judge.save(target)
    return judge, target


def _small(train: LabelledImages, test: LabelledImages, options: dict[str, Any], name: str, progress: bool) -> Judge:
    """Train the small network; options that are None are those of the recipe."""
    changes = {"batch_size": options["batch_size"], "lr": options["learning_rate"], "seed": options["seed"]}
    recipe = {**SMALL_RECIPE, **{key: value for key, value in changes.items() if value is not None}}
    recipe["shift"] = train.image_shape[1] // 16
    if options["epochs"] is not None:
        recipe["steps"] = options["epochs"] * math.ceil(len(train) / recipe["batch_size"])
    model, accuracy = train_small(train, test=test, progress=progress, **recipe)
    recipe |= {"dataset": name, "train_images": len(train), "test_images": len(test)}
    label = f"small-{name.split(':')[0]}"
    return Judge(model, train.class_names, name=label, accuracy=accuracy, recipe=recipe)


def _resnet(train: LabelledImages, test: LabelledImages, options: dict[str, Any], name: str, progress: bool) -> Judge:
    """Train ResNet-34; options that are None are as published."""
    options = {key: RESNET_RECIPE.get(key) if value is None else value for key, value in options.items()}
    recipe = {key: value for key, value in options.items() if key not in ("device", "imagenet_weights")}
    recipe = {"imagenet": options["imagenet_weights"] is not None, **recipe}
    options |= {"device": device_of(options["device"]), "progress": progress}
    model, recognised = train_resnet(train, test, **options)
    measured = [share for share in recognised if not math.isnan(share)]
    counts = torch.bincount(test.labels, minlength=test.num_classes).tolist()
    accuracy = sum(share * n for share, n in zip(recognised, counts, strict=True) if n) / max(1, sum(counts))
    for label, share in zip(test.class_names, recognised, strict=True):
        print(f"{label:16}{share:8.1%}")
    recipe |= {"dataset": name, "train_images": len(train), "test_images": len(test), "worst_class": min(measured)}
    return Judge(model, train.class_names, name=f"resnet34-{name.split(':')[0]}", accuracy=accuracy, recipe=recipe)
