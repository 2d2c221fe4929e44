"""ResNet-34 with a head for the data's classes: the classifier of photographs in papers on unlearning."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..archives import load_mapping
from ..checks import check_int, check_number
from ..data import LabelledImages

IMAGENET_FILE = "resnet34-b627a593.pth"


class ResNetClassifier(nn.Module):
    """torchvision's ResNet of basic blocks, on images that are first resized (bilinear).

    Parameters
    ----------
    num_classes, channels, image_size : int
        Of the data; ``channels`` is 3.
    resize : int
        Height and width of the network's input.
    layers : tuple of int
        Blocks of each stage; (3, 4, 6, 3) is ResNet-34.
    width : int
        Features of the last stage.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or not an integer.
    """

    # Images in a call by a judge.
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
            check_int(name, value, least)
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
        """Compute features float32 (N, width) of images float32 (N, 3, H, W) in [-1, 1]."""
        size = self.config["image_size"]
        if x.ndim != 4 or tuple(x.shape[1:]) != (3, size, size):
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, 3, {size}, {size})")
        # Images in [-1, 1] are normalised already, with mean and standard deviation 0.5.
        resize = self.config["resize"]
        return self.body(F.interpolate(x, size=(resize, resize), mode="bilinear", align_corners=False))

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits float32 (N, num_classes) of images float32 (N, 3, H, W) in [-1, 1]."""
        return self.head(self.features(x))


def load_imagenet(model: ResNetClassifier, path: str | Path) -> None:
    """Load torchvision's ImageNet weights into the body. ValueError if the file does not have them."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"imagenet_weights is {str(path)!r}, no such file: expected torchvision's {IMAGENET_FILE}")
    try:
        state = load_mapping(path)
        model.body.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    except (RuntimeError, ValueError) as error:
        # load_state_dict has a line for each parameter.
        lines = str(error).splitlines()
        reason = lines[0] if len(lines) == 1 else f"{lines[1].strip()[:200]} ..."
        raise ValueError(f"imagenet_weights {path} are not a ResNet-34's: {reason}") from error


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
    """Train a ResNetClassifier: Adam with weight decay, images mirrored at random.

    Parameters
    ----------
    dataset, test : LabelledImages
        Images to train on, and to measure the accuracy on.
    imagenet_weights : str or Path, optional
        File with torchvision's initial weights, as in the published protocol; random weights by default.
    epochs, batch_size : int
        Length of the training.
    learning_rate, head_learning_rate : float, optional
        Rates of body and head. By default 1e-5 and 1e-4 as published, or 1e-3 for both from random weights, for which
        the published rates are too low.
    weight_decay : float
        Adam's weight decay.
    resize, layers
        Of the network.
    seed : int
        Seed of the initial weights and of the training.
    device : torch.device or str
        Where to train.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    model : ResNetClassifier
        On the CPU in eval mode.
    accuracies : list of float
        For each class, the share of its ``test`` images that is classified correctly.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, or the weights are of another network.
    """
    check_int("epochs", epochs, 1)
    check_int("batch_size", batch_size, 1)
    default_rate, default_head_rate = (1e-5, 1e-4) if imagenet_weights is not None else (1e-3, 1e-3)
    learning_rate = default_rate if learning_rate is None else learning_rate
    head_learning_rate = default_head_rate if head_learning_rate is None else head_learning_rate
    check_number("learning_rate", learning_rate, open_low=True)
    check_number("head_learning_rate", head_learning_rate, open_low=True)
    check_number("weight_decay", weight_decay)
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
        {"params": model.body.parameters(), "lr": learning_rate},
        {"params": model.head.parameters(), "lr": head_learning_rate},
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
    accuracies = _accuracies(model, test, batch_size, device)
    return model.cpu(), accuracies


def _train_step(
    model: ResNetClassifier,
    optimizer: torch.optim.Optimizer,
    dataset: LabelledImages,
    indices: Tensor,
    generator: torch.Generator,
    device: torch.device | str,
) -> None:
    images = dataset.batch(indices)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images).to(device)
    optimizer.zero_grad()
    F.cross_entropy(model(images), dataset.labels[indices].to(device)).backward()
    optimizer.step()


@torch.no_grad()
def _accuracies(
    model: ResNetClassifier, dataset: LabelledImages, batch_size: int, device: torch.device | str
) -> list[float]:
    """Compute for each class the share of its images that is classified correctly; NaN if it has no images."""
    correct = torch.zeros(dataset.num_classes, dtype=torch.float64)
    for indices in torch.arange(len(dataset)).split(batch_size):
        labels = dataset.labels[indices]
        hits = model(dataset.batch(indices).to(device)).argmax(1).cpu() == labels
        correct += torch.bincount(labels[hits], minlength=dataset.num_classes)
    return (correct / torch.bincount(dataset.labels, minlength=dataset.num_classes)).tolist()
