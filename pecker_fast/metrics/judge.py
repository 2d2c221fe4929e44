"""Judge: a classifier of generated images with a description of its training, and the shipped judges."""

import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..data import load_digits_images, load_mnist
from ..data.images import check_images
from ..files import save_tensors
from ..records import POSITIVE, Rule, parse_object
from .classifier import SmallClassifier, accuracy, train_classifier
from .resnet import ResNetClassifier

# How train_digits_judge() trains the shipped judge.
DIGITS_RECIPE = {
    "seed": 0,
    "steps": 400,
    "batch_size": 64,
    "lr": 8e-3,
    "noise": 0.3,
    "shift": 1,
    "label_smoothing": 0.05,
    "width": 64,
}
# How train_mnist_judge() trains the shipped judge.
MNIST_RECIPE = {**DIGITS_RECIPE, "steps": 1000, "lr": 4e-3, "shift": 2}
SHIPPED = ("digits", "digits16", "mnist")
METADATA_KEY = "pecker_fast"
KINDS = {kind.__name__: kind for kind in (SmallClassifier, ResNetClassifier)}


class Description(TypedDict):
    """The metadata of a judge's file."""

    kind: Literal["SmallClassifier", "ResNetClassifier"]
    config: dict[str, POSITIVE | list[POSITIVE]]
    class_names: list[str]
    name: Annotated[str, Rule("the name of a judge", bool)]
    accuracy: Annotated[float, Rule("a share from 0 to 1", lambda share: 0 <= share <= 1)] | None
    recipe: dict[str, Any]


class Judge:
    """Classifies generated images and computes their features for distances.

    Parameters
    ----------
    model : SmallClassifier or ResNetClassifier
        The classifier, which is put in eval mode.
    class_names : iterable of str
        A name for each class.
    name : str
        Name of the judge in reports.
    accuracy : float, optional
        Share of held-out real images that it classifies correctly, in [0, 1].
    recipe : dict, optional
        How it was trained, JSON.

    Raises
    ------
    ValueError
        If the number of names is not the model's number of classes.
    """

    def __init__(
        self,
        model: SmallClassifier | ResNetClassifier,
        class_names: Iterable[str],
        *,
        name: str,
        accuracy: float | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.eval()
        self.class_names = tuple(class_names)
        self.name = name
        self.accuracy = accuracy
        self.recipe = dict(recipe or {})
        if len(self.class_names) != model.config["num_classes"]:
            expected = model.config["num_classes"]
            raise ValueError(f"class_names has {len(self.class_names)} names, expected the model's {expected}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def feature_extractor(self) -> str:
        """Name of the features. Compare Fréchet distances and diversities only if it is the same."""
        return f"{self.name}-{self.model.config['width']}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images and compute their features.

        Parameters
        ----------
        images : Tensor
            float32 (N, C, H, W) in [-1, 1], on any device.

        Returns
        -------
        probabilities : Tensor
            float32 (N, num_classes) on the CPU.
        features : Tensor
            float32 (N, width) on the CPU.

        Raises
        ------
        TypeError, ValueError
            If images have another type, shape or range, or an entry is NaN.
        """
        check_images(images)
        self.model.eval()
        device = next(self.model.parameters()).device
        features = [self.model.features(part.to(device)) for part in images.split(self.model.judged_at_a_time)]
        features = torch.cat(features)
        return self.model.head(features).softmax(1).cpu(), features.cpu()

    def save(self, path: str | os.PathLike) -> None:
        """Write weights and description to a safetensors file, atomically; in float16 if that is exact."""
        path = Path(path)
        description = {
            "kind": type(self.model).__name__,
            "config": self.model.config,
            "class_names": self.class_names,
            "name": self.name,
            "accuracy": self.accuracy,
            "recipe": self.recipe,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        if all(torch.equal(halves[name].to(value.dtype), value) for name, value in tensors.items()):
            tensors = halves
        # One key, because the order of several is not fixed in safetensors, and equal judges should be equal files.
        save_tensors(path, tensors, {METADATA_KEY: json.dumps(description, sort_keys=True)})

    @staticmethod
    def names_in(path: str | os.PathLike) -> tuple[str, ...]:
        """The names of the classes that a judge in a file knows; only the file's header is read. Raises as ``load``."""
        return tuple(_description(Path(path))["class_names"])

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Judge":
        """Load a judge that ``save`` has written.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is not a judge.
        """
        path = Path(path)
        description = _description(path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            with torch.random.fork_rng(devices=[]):
                model = KINDS[description["kind"]](**description["config"])
            model.load_state_dict(tensors)
            keys = ("class_names", "name", "accuracy", "recipe")
            return cls(model, **{key: description[key] for key in keys})
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a judge as Judge.save writes it: {error}") from error


def _description(path: Path) -> dict[str, Any]:
    """What ``Judge.save`` has written into the header of a file. Raises as ``Judge.load``."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a judge as Judge.save writes it")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = (file.metadata() or {})[METADATA_KEY]
        return parse_object(metadata, Description, "its metadata", fix="train the judge again")
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a judge as Judge.save writes it: {error}") from error


def train_digits_judge(image_size: int = 8) -> Judge:
    """Train the shipped judge of digits of 8 or 16 pixels, in about 10 or 40 seconds on the CPU.

    It is trained on the "train" split, and its accuracy is measured on "test". Save it to
    pecker_fast/assets/digits/judge.safetensors to replace the shipped file.
    """
    train, test = (load_digits_images(split, image_size=image_size) for split in ("train", "test"))
    # The same shift relative to the image at every size.
    options = {**DIGITS_RECIPE, "shift": DIGITS_RECIPE["shift"] * image_size // 8}
    model, accuracy = train_classifier(train, test=test, **options)
    recipe = {**options, "dataset": "digits", "split": "train"}
    name = "digits-judge" if image_size == 8 else f"digits{image_size}-judge"
    return Judge(model, train.class_names, name=name, accuracy=accuracy, recipe=recipe)


def train_mnist_judge() -> Judge:
    """Train the shipped judge of MNIST's digits, in a few minutes on the CPU.

    It is trained on the "train" split. Its weights are rounded to float16, and then its accuracy is measured on "test".
    Save it to pecker_fast/assets/mnist/judge.safetensors to replace the shipped file.
    """
    train, test = load_mnist("train"), load_mnist("test")
    model, _ = train_classifier(train, test=test, **MNIST_RECIPE)
    model.half().float()
    recipe = {**MNIST_RECIPE, "dataset": "mnist", "split": "train"}
    return Judge(model, train.class_names, name="mnist-judge", accuracy=accuracy(model, test), recipe=recipe)


def load_judge(name: str = "digits") -> Judge:
    """Load a judge that comes with the package. ``Judge.load`` loads others.

    Parameters
    ----------
    name : {"digits", "digits16", "mnist"}
        For scikit-learn's digits with 8 or 16 pixels along each side, or those of MNIST with 28; one channel.

    Raises
    ------
    ValueError
        If the name is unknown.
    FileNotFoundError
        If its file is not installed.
    """
    if name not in SHIPPED:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(SHIPPED)}; Judge.load reads a file")
    asset = resources.files("pecker_fast").joinpath("assets", name, "judge.safetensors")
    if not asset.is_file():
        raise FileNotFoundError(
            f"{asset} is not installed: pecker-fast train-classifier --preset {name} makes this judge"
        )
    with resources.as_file(asset) as path:
        return Judge.load(path)
