"""Distances between sets of feature vectors: Fréchet distance, and diversity within classes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class FeatureStatistics:
    """Count, mean and covariance of feature vectors, gathered in parts, in float64.

    The parts are merged by the update of Chan et al. (1983), which subtracts means before it multiplies: nothing is
    lost where the features are large against their spread.

    Attributes
    ----------
    count: vectors so far. mean: float64 (D,). cov: float64 (D, D), the unbiased sample covariance.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros((dim, dim), dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """The statistics of all rows of ``features``, floating point (N, D)."""
        check_features(features)
        return cls(features.shape[1]).update(features)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def cov(self) -> Tensor:
        """Raises ValueError where fewer than two vectors were seen."""
        if self.count < 2:
            raise ValueError(f"{self.count} feature vectors have no covariance, expected at least 2")
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Adds the rows of ``features``, floating point (N, dim). Returns self."""
        check_features(features)
        if features.shape[1] != self.dim:
            raise ValueError(f"features has {features.shape[1]} columns, expected {self.dim}")
        if len(features) == 0:
            return self
        features = features.detach().double().cpu()
        n = len(features)
        mean = features.mean(0)
        centred = features - mean
        delta = mean - self.mean
        total = self.count + n
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total
        return self


def check_features(features: Tensor, name: str = "features") -> None:
    """Raises TypeError or ValueError unless ``features`` is finite floating point (N, D)."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name} is {kind}, expected a floating point tensor")
    if features.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(features.shape)}, expected (N, D)")
    if not features.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite")


def frechet_distance(features_a: Tensor | FeatureStatistics, features_b: Tensor | FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians: what FID is (Heusel et al. 2017), of any features.

    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), with sample means and unbiased sample covariances. The
    last trace is the sum of the singular values of A^1/2 B^1/2. The roots are symmetric, through eigenvalues that are
    not let below zero, so singular covariances (fewer vectors than dimensions) are no trouble. In float64. Grows as
    samples get fewer: compare only values of equal counts and equal features, and with ``real_split_frechet``.

    Parameters
    ----------
    features_a, features_b: floating point (N, D), N >= 2; or their FeatureStatistics.

    Returns
    -------
    The distance, >= 0: rounding that would leave equal inputs below zero is cut off.

    Raises
    ------
    TypeError, ValueError: other types, shapes or dimensions, entries that are not finite, fewer than two vectors.
    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics.of(x) for x in (features_a, features_b))
    if a.dim != b.dim:
        raise ValueError(f"features_a has dimension {a.dim} and features_b {b.dim}, expected the same")
    cov_a, cov_b = a.cov, b.cov
    shared = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, distance.item())


def _root(cov: Tensor) -> Tensor:
    """The symmetric square root of a covariance matrix."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def real_split_frechet(
    features: Tensor, count: int | None = None, *, labels: Tensor | None = None, repeats: int = 8, seed: int = 0
) -> float:
    """Fréchet distance of real images from other real images: the scale to read a generator's distance on.

    ``count`` vectors drawn without replacement against all the others; the mean of ``repeats`` such splits. Where
    classes lie far apart, most of it comes from the classes' chance shares in the draw. Given ``labels``, each class
    has its share of the draw instead: the stricter scale, and the fair one for images that are generated equally often
    for each class.

    Parameters
    ----------
    features: floating point (N, D), of real images.
    count: vectors on the smaller side, as many as are generated: sampling error grows as they get fewer. None: a third
        of them.
    labels: int64 (N,), the images' classes, to draw from each class in proportion; None: from all together.
    seed: of the splits; the result is deterministic for it.

    Raises
    ------
    TypeError, ValueError: wrong features or labels, fewer than two vectors on a side, or no repeats.
    """
    check_features(features)
    n = len(features)
    count = n // 3 if count is None else count
    if not 2 <= count <= n - 2:
        raise ValueError(f"count is {count}, expected 2 to {n - 2} of {n} features")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    if labels is not None and (labels.dtype is not torch.int64 or tuple(labels.shape) != (n,)):
        raise ValueError(f"labels is {labels.dtype} of shape {tuple(labels.shape)}, expected int64 ({n},)")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(repeats):
        order = torch.randperm(n, generator=generator)
        if labels is not None:
            order = order[_interleaved(labels[order])]
        distances.append(frechet_distance(features[order[:count]], features[order[count:]]))
    return math.fsum(distances) / repeats


def _interleaved(labels: Tensor) -> Tensor:
    """An order in which every beginning has each class in proportion, as nearly as whole numbers allow."""
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = labels == label
        total = int(members.sum())
        position[members] = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    return position.argsort(stable=True)


class Diversity(NamedTuple):
    """``value``: mean over the classes; ``per_class``: class to its ratio."""

    value: float
    per_class: dict[int, float]


def pairwise_distances(features: Tensor, labels: Tensor) -> dict[int, float]:
    """Mean Euclidean distance of two different vectors of a class, for each class in ``labels``, in float64.

    Parameters
    ----------
    features: floating point (N, D). labels: int64 (N,).

    Raises
    ------
    TypeError, ValueError: other types or shapes, or a class with one vector only.
    """
    check_features(features)
    if labels.dtype is not torch.int64 or tuple(labels.shape) != (len(features),):
        raise ValueError(f"labels is {labels.dtype} of shape {tuple(labels.shape)}, expected int64 ({len(features)},)")
    distances = {}
    for label in labels.unique().tolist():
        members = features[labels == label].detach().double().cpu()
        if len(members) < 2:
            raise ValueError(f"class {label} has 1 vector, expected at least 2 to measure a distance")
        distances[label] = torch.pdist(members).mean().item()
    return distances


def diversity(
    features_generated: Tensor,
    labels: Tensor,
    features_real: Tensor | None = None,
    labels_real: Tensor | None = None,
    *,
    real: dict[int, float] | None = None,
) -> Diversity:
    """How varied what is drawn for a class is, against real images of that class: 1 as varied, 0 always the same.

    For each class of ``labels``: mean Euclidean distance over all pairs of generated vectors of the class, divided by
    that over all pairs of real ones. The value is the mean of these ratios, each class counting the same.

    Parameters
    ----------
    features_generated, features_real: floating point (N, D) and (M, D).
    labels, labels_real: int64 (N,) and (M,), the class asked for and that of the real image. Real classes that were not
        generated are left out.
    real: instead of features_real and labels_real, what ``pairwise_distances`` gave for them.

    Raises
    ------
    TypeError, ValueError: other types or shapes; a class with fewer than two vectors on either side, or whose real
    images are all the same.
    """
    if (real is None) == (features_real is None) or (features_real is None) != (labels_real is None):
        raise ValueError("give features_real and labels_real, or real")
    generated = pairwise_distances(features_generated, labels)
    if not generated:
        raise ValueError("labels is empty, expected at least one class")
    if real is None:
        wanted = torch.isin(labels_real, torch.tensor(list(generated)))
        real = pairwise_distances(features_real[wanted], labels_real[wanted])
    ratios = {}
    for label, distance in generated.items():
        if not real.get(label):
            raise ValueError(f"class {label} has no two different real images to compare with")
        ratios[label] = distance / real[label]
    return Diversity(math.fsum(ratios.values()) / len(ratios), ratios)
