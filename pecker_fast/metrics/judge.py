"""Judge: a classifier in use, kept with what it was trained on; the one for digits that is shipped."""

import json
from importlib import resources
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..data import load_digits_images
from ..data.images import check_images
from ..files import save_tensors
from .classifier import SmallClassifier, train_classifier
from .resnet import ResNetClassifier

# The shipped judge: train_digits_judge() trains it again.
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
SHIPPED = ("digits", "digits16")
METADATA_KEY = "pecker_fast"
KINDS = {kind.__name__: kind for kind in (SmallClassifier, ResNetClassifier)}


class Judge:
    """Says what generated images show: classes, their probabilities, and features for distances.

    Parameters
    ----------
    model: the classifier; it is put in eval mode.
    class_names: a name per class.
    name: of the judge, which results are reported under.
    accuracy: share of held-out real images that it puts in their class, in [0, 1]; None: not known.
    recipe: what it was trained with, of JSON's types.

    Raises
    ------
    ValueError: as many names as the model has classes are needed.
    """

    def __init__(
        self,
        model: SmallClassifier | ResNetClassifier,
        class_names,
        *,
        name: str,
        accuracy: float | None = None,
        recipe: dict | None = None,
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
        """Name of the features; Fréchet distances and diversities compare only where it is the same."""
        return f"{self.name}-{self.model.config['width']}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 (N, C, H, W) in [-1, 1], on any device, to probabilities and features on the CPU.

        Returns
        -------
        Probabilities float32 (N, num_classes) and features float32 (N, width).

        Raises
        ------
        TypeError, ValueError: images of another type, shape or range, NaN among them.
        """
        check_images(images)
        self.model.eval()
        device = next(self.model.parameters()).device
        features = [self.model.features(part.to(device)) for part in images.split(self.model.judged_at_a_time)]
        features = torch.cat(features)
        return self.model.head(features).softmax(1).cpu(), features.cpu()

    def save(self, path) -> None:
        """Writes weights and description to a safetensors file, under a temporary name until it is complete."""
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
        # One key: safetensors writes several in no fixed order, and equal judges should be equal files.
        save_tensors(path, tensors, {METADATA_KEY: json.dumps(description, sort_keys=True)})

    @classmethod
    def load(cls, path) -> "Judge":
        """Reads what ``save`` wrote.

        Raises FileNotFoundError where there is no file, ValueError where it is not a judge's.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; expected a judge as Judge.save writes it")
        try:
            with safetensors.safe_open(path, "pt") as file:
                description = json.loads((file.metadata() or {})[METADATA_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            with torch.random.fork_rng(devices=[]):
                model = KINDS[description["kind"]](**description["config"])
            model.load_state_dict(tensors)
            keys = ("class_names", "name", "accuracy", "recipe")
            return cls(model, **{key: description[key] for key in keys})
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a judge as Judge.save writes it: {error}") from error


def train_digits_judge(image_size: int = 8) -> Judge:
    """Trains the shipped judge of the digits of 8 or 16 pixels again, on the CPU, in about 10 or 40 seconds.

    It saw the "train" split alone; its accuracy is on "test".
    ``train_digits_judge().save(...)`` onto pecker_fast/assets/digits/judge.safetensors replaces the shipped one.
    """
    train, test = (load_digits_images(split, image_size=image_size) for split in ("train", "test"))
    # The same part of the image at every size.
    options = {**DIGITS_RECIPE, "shift": DIGITS_RECIPE["shift"] * image_size // 8}
    model, accuracy = train_classifier(train, test=test, **options)
    recipe = {**options, "dataset": "digits", "split": "train"}
    name = "digits-judge" if image_size == 8 else f"digits{image_size}-judge"
    return Judge(model, train.class_names, name=name, accuracy=accuracy, recipe=recipe)


def load_judge(name: str = "digits") -> Judge:
    """A judge that is installed with the package; others are loaded with ``Judge.load``.

    Parameters
    ----------
    name: "digits" or "digits16", for scikit-learn's digits of 8 or 16 pixels a side in one channel.

    Raises
    ------
    ValueError: an unknown name. FileNotFoundError: its file is not installed.
    """
    if name not in SHIPPED:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(SHIPPED)}; Judge.load reads a file")
    asset = resources.files("pecker_fast").joinpath("assets", name, "judge.safetensors")
    if not asset.is_file():
        raise FileNotFoundError(
            f"{asset} is not installed: train_digits_judge() trains this judge, and save() keeps it"
        )
    with resources.as_file(asset) as path:
        return Judge.load(path)
