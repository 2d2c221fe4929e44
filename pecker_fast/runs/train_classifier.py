"""``pecker-fast train-classifier``: the judge of a preset."""

import math
from pathlib import Path

import torch

from ..metrics import Judge, train_digits_judge, train_resnet
from ..training.presets import preset
from .options import DataArguments, PresetName, check_output, device_of
from .unlearn import load_images

# STL-10 is judged on a split of all its labelled images, as the public code has it.
STL10_SHARE, STL10_SEED = 12 / 13, 1234


def train_classifier(
    preset_name: PresetName = "cifar10",
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
) -> None:
    """Trains the classifier that a preset's results are judged by, for --judge of unlearn, evaluate and compare.

    cifar10, stl10 and folders: ResNet-34 at 224 pixels, 10 epochs of Adam. digits, digits16: the small network
    that comes with the package, trained again.

    Args:
        preset_name: cifar10, stl10, digits or digits16.
        dataset_name: cifar10, stl10 or folder:<path>; the preset's by default.
        data_root: Folder with the files of cifar10 or stl10.
        download: Whether the files may be fetched from the internet.
        imagenet_weights: torchvision's resnet34-b627a593.pth to start from, as published; random weights by default.
        epochs: Times that all images are seen.
        batch_size: Images in a step.
        learning_rate: Of the body; 1e-5 with ImageNet's weights, 1e-3 without.
        head_learning_rate: Of the last layer; 1e-4 with ImageNet's weights, 1e-3 without.
        resize: Height and width that the network sees.
        device: cpu, cuda, cuda:1...; a GPU where there is one by default.
        seed: Of everything random.
        output: The file; runs/<preset>-judge.safetensors by default.
        progress_bar: Show a progress bar.
    """
    found = preset(preset_name)
    target = Path(output or f"runs/{preset_name}-judge.safetensors")
    if output is not None:
        check_output(output)
    if found.dataset == "digits" and dataset_name in (None, "digits"):
        judge = train_digits_judge(found.unet.sample_size)
    else:
        place = device_of(device)
        data, size = DataArguments(dataset_name, data_root, download), found.unet.sample_size
        name = dataset_name or found.dataset
        if name == "stl10":
            train, test = load_images(data, preset_name, "all", size).split(STL10_SHARE, STL10_SEED)
        else:
            train, test = (load_images(data, preset_name, split, size) for split in ("train", "test"))
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
        there = [share for share in recognised if not math.isnan(share)]
        counts = torch.bincount(test.labels, minlength=test.num_classes).tolist()
        accuracy = sum(share * n for share, n in zip(recognised, counts, strict=True) if n) / max(1, sum(counts))
        for label, share in zip(test.class_names, recognised, strict=True):
            print(f"{label:16}{share:8.1%}")
        recipe |= {"dataset": name, "train_images": len(train), "test_images": len(test), "worst_class": min(there)}
        judge = Judge(model, train.class_names, name=f"resnet34-{name.split(':')[0]}", accuracy=accuracy, recipe=recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    judge.save(target)
    print(f"recognises {judge.accuracy:.1%} of held-out images; saved: {target}")
