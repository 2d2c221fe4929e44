"""The classifier of photographs that unlearning papers judge by: ResNet-34 with a head of the data's classes."""

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..data import LabelledImages

IMAGENET_FILE = "resnet34-b627a593.pth"


class ResNetClassifier(nn.Module):
    """torchvision's ResNet of basic blocks on images that are resized (bilinear) first.

    Parameters
    ----------
    num_classes, channels, image_size: of the data; ``channels`` is 3.
    resize: height and width that the network sees.
    layers: blocks of each stage; (3, 4, 6, 3) is ResNet-34.
    """

    # Images that a judge gives it in one call.
    judged_at_a_time = 64

    def __init__(
        self,
        num_classes: int,
        channels: int = 3,
        image_size: int = 32,
        resize: int = 224,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 512,
    ) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock, ResNet

        if channels != 3:
            raise ValueError(f"channels is {channels}, expected 3: this is a classifier of colour images")
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("image_size", image_size, 1),
            ("resize", resize, 8),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected a whole number, at least {least}")
        self.config = {
            "num_classes": num_classes,
            "channels": channels,
            "image_size": image_size,
            "resize": resize,
            "layers": list(layers),
            "width": width,
        }
        self.body = ResNet(BasicBlock, list(layers))
        self.body.fc = nn.Identity()
        self.head = nn.Linear(width, num_classes)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """Images float32 (N, 3, H, W) in [-1, 1] to features float32 (N, 512)."""
        size = self.config["image_size"]
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, size, size):
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, 3, {size}, {size})")
        # In [-1, 1] already: mean and standard deviation 0.5 of pixels in [0, 1].
        resize = self.config["resize"]
        return self.body(F.interpolate(x, size=(resize, resize), mode="bilinear", align_corners=False))

    def forward(self, x: Tensor) -> Tensor:
        """Images float32 (N, 3, H, W) in [-1, 1] to logits float32 (N, num_classes)."""
        return self.head(self.features(x))


def load_imagenet(model: ResNetClassifier, path: str | Path) -> None:
    """Loads torchvision's ImageNet weights into the body. ValueError where the file has not those of this network."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"imagenet_weights is {str(path)!r}, no such file: expected torchvision's {IMAGENET_FILE}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.body.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    except (RuntimeError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"imagenet_weights {path} are not a ResNet-34's: {str(error).splitlines()[:1]}") from error


def train_resnet(
    dataset: LabelledImages,
    test: LabelledImages,
    *,
    imagenet_weights: str | Path | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float = 5e-4,
    resize: int = 224,
    layers: tuple[int, ...] = (3, 4, 6, 3),
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[ResNetClassifier, list[float]]:
    """Trains a ResNetClassifier: Adam with weight decay, images mirrored at random.

    Parameters
    ----------
    imagenet_weights: file to start from, as published; None: from random weights.
    learning_rate, head_learning_rate: of body and head. None: 1e-5 and 1e-4 as published, or 1e-3 for both from random
        weights, which the published rates are too low for.
    resize, layers: of the network.

    Returns the network on the CPU in eval mode, and for each class the share of its ``test`` images that it recognises.
    Raises ValueError for arguments out of range and for weights of another network.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number, at least 1")
    rates = (1e-5, 1e-4) if imagenet_weights is not None else (1e-3, 1e-3)
    given = (learning_rate, head_learning_rate)
    body_rate, head_rate = (usual if rate is None else rate for usual, rate in zip(rates, given, strict=True))
    if not body_rate > 0 or not head_rate > 0 or not weight_decay >= 0:
        raise ValueError(f"learning rates are {body_rate} and {head_rate}, expected above 0, weight_decay at least 0")
    if test.image_shape != dataset.image_shape or test.class_names != dataset.class_names:
        raise ValueError("test has images of another shape or other classes than dataset, expected the same")
    channels, height, _ = dataset.image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNetClassifier(dataset.num_classes, channels, height, resize, layers)
    if imagenet_weights is not None:
        load_imagenet(model, imagenet_weights)
    model.to(device).train()
    groups = [
        {"params": model.body.parameters(), "lr": body_rate},
        {"params": model.head.parameters(), "lr": head_rate},
    ]
    optimizer = torch.optim.Adam(groups, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=epochs * -(-len(dataset) // batch_size), unit="step", desc="classifier", disable=not progress)
    with bar:
        for _ in range(epochs):
            for indices in torch.randperm(len(dataset), generator=generator).split(batch_size):
                # A batch of one has no variance to normalise by.
                if len(indices) > 1:
                    _train_step(model, optimizer, dataset, indices, generator, device)
                bar.update()
    model.eval()
    recognised = _by_class(model, test, batch_size, device)
    return model.cpu(), recognised


def _train_step(model, optimizer, dataset: LabelledImages, indices: Tensor, generator, device) -> None:
    images = dataset.batch(indices)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images).to(device)
    optimizer.zero_grad()
    F.cross_entropy(model(images), dataset.labels[indices].to(device)).backward()
    optimizer.step()


@torch.no_grad()
def _by_class(model, dataset: LabelledImages, batch_size: int, device) -> list[float]:
    """For each class the share of its images that are put in it; NaN where there are none."""
    right = torch.zeros(dataset.num_classes, dtype=torch.float64)
    for indices in torch.arange(len(dataset)).split(batch_size):
        labels = dataset.labels[indices]
        hits = model(dataset.batch(indices).to(device)).argmax(1).cpu() == labels
        right += torch.bincount(labels[hits], minlength=dataset.num_classes)
    return (right / torch.bincount(dataset.labels, minlength=dataset.num_classes)).tolist()
