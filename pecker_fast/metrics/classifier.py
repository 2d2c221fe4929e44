"""SmallClassifier: a convolutional network that tells generated images of a small data set apart, and its training."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import LabelledImages


class SmallClassifier(nn.Module):
    """Classifier of images of 8 to 32 pixels, about 60,000 parameters at 8 pixels.

    Stages of 3 x 3 convolution, batch normalisation and ReLU, halved until 4 pixels are left, averaged to 2 x 2, then
    a layer of ``width`` features and one of logits.

    Parameters
    ----------
    num_classes, channels, image_size: of the data.
    width: features before the last layer.
    """

    # Images that a judge gives it in one call.
    judged_at_a_time = 512

    def __init__(self, num_classes: int, channels: int = 1, image_size: int = 8, width: int = 64) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("channels", channels, 1),
            ("image_size", image_size, 4),
            ("width", width, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected a whole number, at least {least}")
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
        """Images float32 (N, C, H, W) in [-1, 1] to features float32 (N, width), all >= 0."""
        expected = (self.config["channels"], self.config["image_size"], self.config["image_size"])
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, expected))})")
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images float32 (N, C, H, W) in [-1, 1] to logits float32 (N, num_classes)."""
        return self.head(self.features(x))


def _stage(channels_in: int, channels_out: int) -> list[nn.Module]:
    # The normalisation subtracts the mean, and with it any bias.
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
) -> tuple[SmallClassifier, float]:
    """Trains a SmallClassifier with noisy, shifted images, so that it can judge what a generator draws.

    Adam with a cosine decay to zero. Deterministic for a seed on one machine and number of threads; the global random
    state is neither used nor changed.

    Parameters
    ----------
    dataset: what to train on.
    test: images to measure the accuracy on; None: 20 % of each class of ``dataset``, which are then not trained on.
    noise: each image gets Gaussian noise of a standard deviation drawn from [0, noise]; pixels are in [-1, 1].
    label_smoothing: share of the target spread over all classes. It makes the judge's errors fewer, and its probability
        of a clear image about 1 - label_smoothing.
    shift: each image is moved by up to so many pixels along both axes, -1 (black) moving in.
    seed, steps, batch_size, lr, width: of the training, and of the network.

    Returns
    -------
    The network in eval mode, and its accuracy on ``test`` as a share in [0, 1].

    Raises
    ------
    ValueError: an argument out of range, images that are not square, or different images in ``test``.
    """
    for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 2), ("shift", shift, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, expected a whole number, at least {least}")
    if not lr > 0 or not noise >= 0:
        raise ValueError(f"lr is {lr} and noise is {noise}, expected lr > 0 and noise >= 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a share in [0, 1)")
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
    for _ in range(steps):
        indices = torch.randint(len(dataset), (batch_size,), generator=generator)
        images = augment(dataset.batch(indices), noise=noise, shift=shift, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), dataset.labels[indices], label_smoothing=label_smoothing).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return model, accuracy(model, test)


def augment(images: Tensor, *, noise: float, shift: int, generator: torch.Generator) -> Tensor:
    """Images float32 (N, C, H, W), moved by up to ``shift`` pixels each, plus noise of up to ``noise``."""
    n, channels, height, width = images.shape
    if shift:
        offsets = torch.randint(2 * shift + 1, (2, n, 1), generator=generator)
        rows, columns = offsets[0] + torch.arange(height), offsets[1] + torch.arange(width)
        padded = F.pad(images, (shift, shift, shift, shift), value=-1.0)
        index = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
        images = padded[(*index, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width))]
    level = noise * torch.rand((n, 1, 1, 1), generator=generator)
    return images + level * torch.randn(images.shape, generator=generator)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: LabelledImages, batch_size: int = 512) -> float:
    """Share of the images of ``dataset`` that ``model`` puts in their class, in [0, 1]."""
    correct = 0
    for indices in torch.arange(len(dataset)).split(batch_size):
        correct += int((model(dataset.batch(indices)).argmax(1) == dataset.labels[indices]).sum())
    return correct / len(dataset)
