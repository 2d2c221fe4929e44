"""SmallClassifier: a convolutional classifier of generated images of a small data set, and its training."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import check_int, check_number
from ..data import LabelledImages
from ..shifts import shifted


class SmallClassifier(nn.Module):
    """A classifier of images of 8 to 32 pixels, with about 60,000 parameters at 8 pixels.

    Stages of 3 x 3 convolution, batch normalisation, ReLU and pooling down to 4 pixels, average pooling to 2 x 2, a
    layer of ``width`` features, and a layer of logits.

    Parameters
    ----------
    num_classes, channels, image_size : int
        Of the data.
    width : int
        Features before the last layer.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or not an integer.
    """

    # Images in a call by a judge.
    judged_at_a_time = 512

    def __init__(self, num_classes: int, channels: int = 1, image_size: int = 8, width: int = 64) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("channels", channels, 1),
            ("image_size", image_size, 4),
            ("width", width, 1),
        ):
            check_int(name, value, least)
        self.config = {"num_classes": num_classes, "channels": channels, "image_size": image_size, "width": width}
        layers = _stage(channels, 32)
        channels = 32
        for _ in range(max(1, math.ceil(math.log2(image_size / 4)))):
            layers += [*_stage(channels, 48), nn.MaxPool2d(2)]
            channels = 48
        layers += [*_stage(channels, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.body = nn.Sequential(*layers, nn.Linear(64 * 4, width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute features float32 (N, width), all >= 0, of images float32 (N, C, H, W) in [-1, 1]."""
        expected = (self.config["channels"], self.config["image_size"], self.config["image_size"])
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits float32 (N, num_classes) of images float32 (N, C, H, W) in [-1, 1]."""
        return self.head(self.features(x))


def _stage(channels_in: int, channels_out: int) -> list[nn.Module]:
    # Without a bias, which the normalisation would remove.
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(channels_out), nn.ReLU()]


def train_classifier(
    dataset: LabelledImages,
    *,
    test: LabelledImages | None = None,
    seed: int = 0,
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 8e-3,
    noise: float = 0.3,
    shift: int = 1,
    label_smoothing: float = 0.05,
    width: int = 64,
    progress: bool = False,
) -> tuple[SmallClassifier, float]:
    """Train a SmallClassifier on noisy, shifted images, so that it can judge generated images.

    Adam with cosine decay to zero. The result is deterministic for a seed on one machine with one number of threads;
    the global random state is neither used nor changed.

    Parameters
    ----------
    dataset : LabelledImages
        Images to train on.
    test : LabelledImages, optional
        Images to measure the accuracy on; by default 20 % of each class of ``dataset``, which are not trained on.
    seed : int
        Seed of the initial weights and of the training.
    steps, batch_size : int
        Length of the training.
    lr : float
        Initial learning rate.
    noise : float
        Each image gets Gaussian noise with a standard deviation from [0, noise]; pixels are in [-1, 1].
    shift : int
        Each image is shifted by up to this many pixels along both axes and padded with -1 (black).
    label_smoothing : float
        Share of the target spread over all classes. It reduces the judge's errors, and limits its probability for a
        clear image to about 1 - label_smoothing.
    width : int
        Features of the network.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    model : SmallClassifier
        In eval mode.
    accuracy : float
        Share of ``test`` that is classified correctly, in [0, 1].

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, images are not square, or ``test`` has images or classes of another kind.
    """
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 2), ("shift", shift, 0)):
        check_int(name, value, least)
    check_number("lr", lr, open_low=True)
    check_number("noise", noise)
    check_number("label_smoothing", label_smoothing, 0, 1, open_high=True)
    if test is None:
        dataset, test = dataset.split(0.8, seed)
    if test.image_shape != dataset.image_shape or test.class_names != dataset.class_names:
        raise ValueError("test has images of another shape or other classes than dataset, expected the same")
    channels, height, image_width = dataset.image_shape
    if height != image_width:
        raise ValueError(f"dataset has images of {height} x {image_width} pixels, expected square ones")
    if not len(dataset) or not len(test):
        raise ValueError(f"dataset has {len(dataset)} images and test {len(test)}, expected at least one each")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallClassifier(dataset.num_classes, channels, height, width)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), unit="step", desc="classifier", disable=not progress):
        indices = torch.randint(len(dataset), (batch_size,), generator=generator)
        images = augment(dataset.batch(indices), noise=noise, shift=shift, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), dataset.labels[indices], label_smoothing=label_smoothing).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return model, accuracy(model, test)


def augment(images: Tensor, *, noise: float, shift: int, generator: torch.Generator) -> Tensor:
    """Shift images float32 (N, C, H, W) by up to ``shift`` pixels and add noise of up to ``noise``."""
    n = len(images)
    if shift:
        images = shifted(images, torch.randint(2 * shift + 1, (2, n), generator=generator), shift)
    level = noise * torch.rand((n, 1, 1, 1), generator=generator)
    return images + level * torch.randn(images.shape, generator=generator)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: LabelledImages, batch_size: int = 512) -> float:
    """Compute the share of ``dataset`` that ``model`` classifies correctly, in [0, 1]."""
    correct = 0
    for indices in torch.arange(len(dataset)).split(batch_size):
        correct += int((model(dataset.batch(indices)).argmax(1) == dataset.labels[indices]).sum())
    return correct / len(dataset)
