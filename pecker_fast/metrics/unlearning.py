"""Figures of an unlearned generator: forgetting, and the quality of the retained classes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import LabelledImages
from ..data.images import check_classes, check_labels
from .accuracy import confusion_counts, retained_accuracy, unlearning_accuracy
from .by_class import class_figures, forgotten_share
from .features import FeatureStatistics, diversity, frechet_distance, pairwise_distances, real_split_frechet
from .judge import Judge

# Real images judged at a time: those of a folder are read from files.
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class RealStatistics:
    """Statistics of the real images of retained classes. Images of forgotten classes are not used.

    Attributes
    ----------
    forget_classes : tuple of int
        The forgotten classes.
    cover_class : int or None
        The cover class.
    retained_features : Tensor
        Features of the real images, float32 (N, D).
    retained_labels : Tensor
        Their classes, int64 (N,).
    retained : FeatureStatistics
        Statistics of these features.
    pairwise : dict
        From each retained class to the mean distance within it.
    cover : FeatureStatistics or None
        Statistics of the cover class's real images.
    feature_extractor : str
        Name of the features.
    """

    forget_classes: tuple[int, ...]
    cover_class: int | None
    retained_features: Tensor = field(repr=False)
    retained_labels: Tensor = field(repr=False)
    retained: FeatureStatistics = field(repr=False)
    pairwise: dict[int, float] = field(repr=False)
    cover: FeatureStatistics | None = field(repr=False)
    feature_extractor: str

    @classmethod
    def of(
        cls, dataset: LabelledImages, judge: Judge, forget_classes: Iterable[int], cover_class: int | None = None
    ) -> "RealStatistics":
        """Judge the real images of the retained classes. Arguments and errors are Evaluator's."""
        forget_classes = check_classes("forget_classes", forget_classes, dataset.num_classes)
        if judge.class_names != dataset.class_names:
            raise ValueError(f"judge has classes {judge.class_names}, dataset {dataset.class_names}; expected the same")
        keep = [label for label in range(dataset.num_classes) if label not in forget_classes]
        if not keep:
            raise ValueError(f"forget_classes is all {dataset.num_classes} classes, expected one left to retain")
        if cover_class is not None:
            check_classes("cover_class", [cover_class], dataset.num_classes)
            if not forget_classes or cover_class in forget_classes:
                raise ValueError(f"cover_class is {cover_class}, expected a class outside forget_classes")
        real = dataset.of_classes(keep)
        missing = sorted(set(keep) - set(real.labels.tolist()))
        if missing:
            raise ValueError(f"dataset has no images of the classes {missing}, expected some of every retained class")
        features = torch.cat([judge(real.batch(indices))[1] for indices in torch.arange(len(real)).split(CHUNK)])
        cover = None if cover_class is None else FeatureStatistics.of(features[real.labels == cover_class])
        pairwise = pairwise_distances(features, real.labels)
        statistics = FeatureStatistics.of(features)
        extractor = judge.feature_extractor
        return cls(forget_classes, cover_class, features, real.labels, statistics, pairwise, cover, extractor)


def evaluate_samples(
    judge: Judge,
    images: Tensor,
    labels: Tensor,
    *,
    forget_classes: Iterable[int],
    real_statistics: RealStatistics,
) -> dict[str, float | str | None]:
    """Measure generated images.

    A model that outputs noise also has 100 % UA: read "ua" together with the accuracy, distance and diversity of the
    retained classes, and with the distance from the cover class and its diversity.

    Parameters
    ----------
    judge : Judge
        Classifies the images and computes features.
    images : Tensor
        Floating (N, C, H, W), clamped to [-1, 1] as in a saved image.
    labels : Tensor
        Requested classes, int64 (N,). Every class needs at least two images.
    forget_classes : iterable of int
        The forgotten classes; empty for a generator that has not unlearned.
    real_statistics : RealStatistics
        For the same judge and forgotten classes.

    Returns
    -------
    dict
        Figures, None without a forgotten class or cover class:

        * "ua", unlearning accuracy: the percentage of images requested for forgotten classes that the judge classifies
          as none of them;
        * "forget_probability": the judge's total probability of the forgotten classes, mean over these images, in
          [0, 1];
        * "forget_entropy": entropy of the judge's probabilities in nats, mean over these images;
        * "forgotten_share": the percentage of all images that the judge classifies as a forgotten class;
        * "retain_accuracy": the percentage of images requested for retained classes that the judge classifies as the
          requested class;
        * "frechet_distance": of the retained classes' images from their real ones;
        * "u_frechet_distance": of all images, those requested for forgotten classes among them, from the same real
          ones;
        * "diversity": of the retained classes' images, see ``diversity``;
        * "cover_frechet_distance": of images requested for forgotten classes from real images of the cover class;
        * "cover_diversity": mean distance between two images requested for the same forgotten class, relative to that
          between two real images of the cover class, mean over the forgotten classes;
        * "feature_extractor": name of the features of these distances.

    Raises
    ------
    TypeError, ValueError
        If types, shapes or classes do not fit, images are not finite, or a class has fewer than two images.
    """
    check_real(judge, forget_classes, real_statistics)
    probabilities, features, labels = judged(judge, images, labels)
    return _figures(probabilities, features, labels, real_statistics)


def check_real(judge: Judge, forget_classes: Iterable[int], real: RealStatistics) -> None:
    """Raise ValueError unless the statistics are for the judge and the forgotten classes."""
    forget_classes = check_classes("forget_classes", forget_classes, judge.num_classes)
    if forget_classes != real.forget_classes or judge.feature_extractor != real.feature_extractor:
        raise ValueError(
            f"real_statistics is for {real.feature_extractor} and forget_classes {list(real.forget_classes)}, "
            f"expected {judge.feature_extractor} and {list(forget_classes)}"
        )


def judged(judge: Judge, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The judge's probabilities and features of images, and their labels on the CPU. Arguments and errors are those of
    ``evaluate_samples``."""
    check_labels(labels, judge.num_classes)
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images is {kind}, expected a floating point tensor")
    if len(images) != len(labels):
        raise ValueError(f"labels has {len(labels)} entries, expected one for each of {len(images)} images")
    if not images.isfinite().all():
        raise ValueError("images has entries that are not finite: the generator has diverged")
    labels = labels.cpu()
    counts = labels.bincount(minlength=judge.num_classes)
    if (counts < 2).any():
        few = (counts < 2).nonzero().flatten().tolist()
        raise ValueError(f"labels has fewer than 2 images of the classes {few}, expected 2 or more of every class")

    return *judge(images.float().clamp(-1, 1)), labels


def _figures(
    probabilities: Tensor, features: Tensor, labels: Tensor, real: RealStatistics
) -> dict[str, float | str | None]:
    forget_classes = real.forget_classes
    forgotten = torch.isin(labels, torch.tensor(forget_classes, dtype=torch.int64))
    retained = ~forgotten
    confusion = confusion_counts(labels, probabilities.argmax(1), probabilities.shape[1])
    result = {
        "ua": None,
        "retain_accuracy": retained_accuracy(confusion, forget_classes),
        "frechet_distance": frechet_distance(features[retained], real.retained),
        "diversity": diversity(features[retained], labels[retained], real=real.pairwise).value,
        "cover_frechet_distance": None,
        "cover_diversity": None,
        "forget_probability": None,
        "forget_entropy": None,
        "forgotten_share": None,
        "u_frechet_distance": None,
        "feature_extractor": real.feature_extractor,
    }
    if forget_classes:
        of_forgotten = probabilities[forgotten].double()
        result["ua"] = unlearning_accuracy(confusion, forget_classes)
        result["forget_probability"] = of_forgotten[:, list(forget_classes)].sum(1).mean().item()
        result["forgotten_share"] = forgotten_share(probabilities, forget_classes)
        result["u_frechet_distance"] = frechet_distance(features, real.retained)
        result["forget_entropy"] = torch.special.entr(of_forgotten).sum(1).mean().item()
    if real.cover is not None:
        distances = {label: real.pairwise[real.cover_class] for label in forget_classes}
        result["cover_frechet_distance"] = frechet_distance(features[forgotten], real.cover)
        result["cover_diversity"] = diversity(features[forgotten], labels[forgotten], real=distances).value
    return result


class Evaluator:
    """Measures generated images repeatedly; real images are judged only once.

    Parameters
    ----------
    dataset : LabelledImages
        Real images. Those of forgotten classes are not used.
    judge : Judge
        A judge of the same classes.
    forget_classes : iterable of int
        The forgotten classes; empty for a generator that has not unlearned.
    cover_class : int, optional
        The class that replaces them.

    Raises
    ------
    TypeError, ValueError
        If a class does not exist, the judge has other classes, a retained class has fewer than two images, or the cover
        class is forgotten.
    """

    def __init__(
        self, dataset: LabelledImages, judge: Judge, forget_classes: Iterable[int], cover_class: int | None = None
    ) -> None:
        self.judge = judge
        self.real = RealStatistics.of(dataset, judge, forget_classes, cover_class)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float | str | None]:
        """Measure images as ``evaluate_samples`` does."""
        return evaluate_samples(
            self.judge, images, labels, forget_classes=self.real.forget_classes, real_statistics=self.real
        )

    def with_classes(self, images: Tensor, labels: Tensor) -> tuple[dict[str, float | str | None], dict[str, Any]]:
        """Measure images as ``evaluate_samples`` and as ``class_figures`` do, and judge them once."""
        probabilities, features, labels = judged(self.judge, images, labels)
        real = self.real
        classes = class_figures(probabilities, labels, real.forget_classes, real.cover_class, self.judge.class_names)
        return _figures(probabilities, features, labels, real), classes

    def real_split_frechet(
        self, count: int | None = None, *, stratified: bool = False, repeats: int = 8, seed: int = 0
    ) -> float:
        """Compute ``real_split_frechet`` of the retained classes, the reference for "frechet_distance".

        Parameters
        ----------
        count : int, optional
            Number of generated images of these classes.
        stratified : bool
            Whether each class has its exact share, as if all are requested equally often.
        repeats, seed
            As in ``real_split_frechet``.
        """
        labels = self.real.retained_labels if stratified else None
        return real_split_frechet(self.real.retained_features, count, labels=labels, repeats=repeats, seed=seed)
