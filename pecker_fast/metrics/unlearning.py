"""What is reported of an unlearned generator: forgetting, and the quality of everything else. Evaluator."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data import LabelledImages
from ..data.images import check_classes, check_labels
from .features import FeatureStatistics, diversity, frechet_distance, pairwise_distances, real_split_frechet
from .judge import Judge

# Real images are judged so many at a time: those of a folder are read from files.
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class RealStatistics:
    """What is needed of the real images; nothing in it comes from images of a forgotten class.

    Attributes
    ----------
    forget_classes, cover_class: what it was made for.
    retained_features, retained_labels: float32 (N, D) and int64 (N,), of the real images of the retained classes.
    retained: their statistics.
    pairwise: retained class to the mean distance within it.
    cover: statistics of the cover class's real images, or None.
    feature_extractor: name of the features.
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
        """Judges the real images of the retained classes. Arguments and errors: as Evaluator's."""
        forget_classes = check_classes("forget_classes", forget_classes, dataset.num_classes)
        if judge.class_names != dataset.class_names:
            raise ValueError(f"judge has classes {judge.class_names}, dataset {dataset.class_names}; expected the same")
        keep = [label for label in range(dataset.num_classes) if label not in forget_classes]
        if not keep:
            raise ValueError(f"forget_classes is all {dataset.num_classes} classes, expected at least one to be left")
        if cover_class is not None:
            check_classes("cover_class", [cover_class], dataset.num_classes)
            if not forget_classes or cover_class in forget_classes:
                raise ValueError(f"cover_class is {cover_class}, expected a class beside those of forget_classes")
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
    """Measures generated images.

    Forgetting alone can be had by drawing nothing: read "ua" together with the accuracy, distance and diversity of the
    retained classes, and with the cover class's distance and diversity of what is now drawn for the forgotten one.

    Parameters
    ----------
    judge: that classifies, and gives features.
    images: floating point (N, C, H, W); cut to [-1, 1], as they would be when saved. NaN is an error.
    labels: int64 (N,), the class that each image was asked for. Every retained class needs two images or more.
    forget_classes: the forgotten classes; none for a generator that has not unlearned.
    real_statistics: RealStatistics.of the same judge and forgotten classes.

    Returns
    -------
    A flat dict, with None where there is nothing to measure (no forgotten class, no cover class):

    "ua": unlearning accuracy in percent: of the images asked for a forgotten class, those that the judge calls none of
        the forgotten classes.
    "forget_probability": probability of the forgotten classes together by the judge, mean over those images, in [0, 1].
    "forget_entropy": entropy of the judge's probabilities in nats, mean over those images.
    "retain_accuracy": percent of the images asked for retained classes that the judge puts in the class asked for.
    "frechet_distance": of these images from the real ones of the retained classes.
    "diversity": of these images; see ``diversity``.
    "cover_frechet_distance": of the images asked for forgotten classes from real images of the cover class.
    "cover_diversity": mean distance of two such images asked for the same class, over that of two real images of the
        cover class; mean over the forgotten classes.
    "feature_extractor": name of the features that the distances are measured in.

    Raises
    ------
    TypeError, ValueError: wrong types, shapes or classes; images that are not finite; a forgotten class that no image,
    or a class that one image only, was asked for.
    """
    real = real_statistics
    forget_classes = check_classes("forget_classes", forget_classes, judge.num_classes)
    if forget_classes != real.forget_classes or judge.feature_extractor != real.feature_extractor:
        raise ValueError(
            f"real_statistics is for {real.feature_extractor} and forget_classes {list(real.forget_classes)}, "
            f"not for {judge.feature_extractor} and {list(forget_classes)}"
        )
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
        raise ValueError(f"fewer than 2 images were asked for the classes {few}, expected 2 or more of every class")

    probabilities, features = judge(images.float().clamp(-1, 1))
    forgotten = torch.isin(labels, torch.tensor(forget_classes, dtype=torch.int64))
    retained = ~forgotten
    predictions = probabilities.argmax(1)
    result = {
        "ua": None,
        "retain_accuracy": _percent(predictions[retained] == labels[retained]),
        "frechet_distance": frechet_distance(features[retained], real.retained),
        "diversity": diversity(features[retained], labels[retained], real=real.pairwise).value,
        "cover_frechet_distance": None,
        "cover_diversity": None,
        "forget_probability": None,
        "forget_entropy": None,
        "feature_extractor": judge.feature_extractor,
    }
    if forget_classes:
        drawn = probabilities[forgotten].double()
        still = torch.isin(predictions[forgotten], torch.tensor(forget_classes))
        result["ua"] = 100 - _percent(still)
        result["forget_probability"] = drawn[:, list(forget_classes)].sum(1).mean().item()
        result["forget_entropy"] = torch.special.entr(drawn).sum(1).mean().item()
    if real.cover is not None:
        distances = {label: real.pairwise[real.cover_class] for label in forget_classes}
        result["cover_frechet_distance"] = frechet_distance(features[forgotten], real.cover)
        result["cover_diversity"] = diversity(features[forgotten], labels[forgotten], real=distances).value
    return result


def _percent(hits: Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)


class Evaluator:
    """Measures generated images again and again; the real ones are judged once.

    Parameters
    ----------
    dataset: real images. Those of forgotten classes are left out.
    judge: with the same classes.
    forget_classes: the forgotten classes; none for a generator that has not unlearned.
    cover_class: what is to be drawn in their place, or None.

    Raises
    ------
    TypeError, ValueError: classes that there are not, or that the judge does not know; a retained class with fewer than
    two images; a cover class that is forgotten.
    """

    def __init__(
        self, dataset: LabelledImages, judge: Judge, forget_classes: Iterable[int], cover_class: int | None = None
    ) -> None:
        self.judge = judge
        self.real = RealStatistics.of(dataset, judge, forget_classes, cover_class)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float | str | None]:
        """See ``evaluate_samples``."""
        return evaluate_samples(
            self.judge, images, labels, forget_classes=self.real.forget_classes, real_statistics=self.real
        )

    def real_split_frechet(
        self, count: int | None = None, *, stratified: bool = False, repeats: int = 8, seed: int = 0
    ) -> float:
        """``real_split_frechet`` of the retained classes: the scale to read "frechet_distance" on.

        ``count`` should be as many images as are generated for them; ``stratified`` where the classes are asked for
        equally often.
        """
        labels = self.real.retained_labels if stratified else None
        return real_split_frechet(self.real.retained_features, count, labels=labels, repeats=repeats, seed=seed)
