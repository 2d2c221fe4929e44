"""Distances between sets of feature vectors: Fréchet distance, and diversity within classes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_int


class FeatureStatistics:
    """Count, mean and covariance of feature vectors, accumulated in parts in float64.

    Parts are merged by the update of Chan et al. (1983), which subtracts means before multiplying, so that no digits
    are lost if the features are large compared with their spread.

    Parameters
    ----------
    dim : int
        Length of a vector, D.

    Attributes
    ----------
    count : int
        Number of vectors.
    mean : Tensor
        float64 (D,).
    cov : Tensor
        The unbiased sample covariance, float64 (D, D).
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros((dim, dim), dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Compute the statistics of the rows of ``features``, floating (N, D)."""
        check_features(features)
        return cls(features.shape[1]).update(features)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def cov(self) -> Tensor:
        """ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"{self.count} feature vectors have no covariance, expected at least 2")
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Add the rows of ``features``, floating (N, dim), and return self."""
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
    """Raise TypeError or ValueError unless ``features`` is finite and floating, (N, D)."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name} is {kind}, expected a floating point tensor")
    if features.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(features.shape)}, expected (N, D)")
    if not features.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite")


def frechet_distance(features_a: Tensor | FeatureStatistics, features_b: Tensor | FeatureStatistics) -> float:
    """Compute the squared Fréchet distance of two Gaussians, as in FID (Heusel et al. 2017), for any features.

    It is |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), with sample means and unbiased sample
    covariances, in float64. The last trace is the sum of the singular values of A^1/2 B^1/2. The symmetric roots come
    from eigenvalues clamped at zero, so singular covariances (fewer vectors than dimensions) are allowed. The distance
    grows with fewer samples: compare only values of equal counts and features, and with ``real_split_frechet``.

    Parameters
    ----------
    features_a, features_b : Tensor or FeatureStatistics
        Floating (N, D) with N >= 2, or their statistics.

    Returns
    -------
    float
        The distance, clamped at zero: rounding could make it negative for equal inputs.

    Raises
    ------
    TypeError, ValueError
        If types, shapes or dimensions do not fit, entries are not finite, or there are fewer than two vectors.
    """
    a, b = (x if isinstance(x, FeatureStatistics) else FeatureStatistics.of(x) for x in (features_a, features_b))
    if a.dim != b.dim:
        raise ValueError(f"features_a has dimension {a.dim} and features_b {b.dim}, expected the same")
    cov_a, cov_b = a.cov, b.cov
    shared = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, distance.item())


def _root(cov: Tensor) -> Tensor:
    """Compute the symmetric square root of a covariance matrix."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def real_split_frechet(
    features: Tensor, count: int | None = None, *, labels: Tensor | None = None, repeats: int = 8, seed: int = 0
) -> float:
    """Compute the Fréchet distance between two parts of real images, the reference for a generator's distance.

    It is the mean over ``repeats`` random splits into ``count`` vectors and the rest. If classes are far apart, most of
    it comes from their random shares in the split. With ``labels`` each class has its exact share: this is the stricter
    reference, and the fair one for images that are generated equally often for each class.

    Parameters
    ----------
    features : Tensor
        Floating (N, D), of real images.
    count : int, optional
        Vectors in the first part, as many as are generated, because sampling error grows with fewer; by default a third
        of all.
    labels : Tensor, optional
        Classes of the images, int64 (N,), to split each class in proportion.
    repeats : int
        Number of splits.
    seed : int
        Seed of the splits, which determines the result.

    Returns
    -------
    float
        The mean distance.

    Raises
    ------
    TypeError, ValueError
        If features or labels are invalid, a part has fewer than two vectors, or ``repeats`` is below 1.
    """
    check_features(features)
    n = len(features)
    count = n // 3 if count is None else count
    check_int("count", count, 2, n - 1)
    check_int("repeats", repeats, 1)
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
    """Return an order whose every prefix has each class in proportion, up to rounding."""
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = labels == label
        total = int(members.sum())
        position[members] = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    return position.argsort(stable=True)


class Diversity(NamedTuple):
    """The diversity: ``value`` is the mean over classes, ``per_class`` maps each class to its ratio."""

    value: float
    per_class: dict[int, float]


def pairwise_distances(features: Tensor, labels: Tensor) -> dict[int, float]:
    """Compute the mean Euclidean distance between two vectors of a class, for each class in ``labels``, in float64.

    Parameters
    ----------
    features : Tensor
        Floating (N, D).
    labels : Tensor
        int64 (N,).

    Returns
    -------
    dict
        From a class to its distance.

    Raises
    ------
    TypeError, ValueError
        If types or shapes do not fit, or a class has only one vector.
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
    """Compute the diversity of generated images relative to real images of the same classes.

    For each class of ``labels`` it is the mean Euclidean distance between generated vectors, divided by that between
    real ones: 1 if they vary equally, 0 if all generated images are the same. The value is the mean over classes, with
    equal weights.

    Parameters
    ----------
    features_generated : Tensor
        Floating (N, D).
    labels : Tensor
        Requested classes, int64 (N,).
    features_real : Tensor, optional
        Floating (M, D).
    labels_real : Tensor, optional
        Classes of the real images, int64 (M,). Classes that were not generated are ignored.
    real : dict, optional
        ``pairwise_distances`` of the real images, instead of ``features_real`` and ``labels_real``.

    Returns
    -------
    Diversity
        The mean, and the ratio of each class.

    Raises
    ------
    TypeError, ValueError
        If types or shapes do not fit, a class has fewer than two vectors, or its real images are all the same.
    """
    if (real is None) == (features_real is None) or (features_real is None) != (labels_real is None):
        raise ValueError("expected features_real and labels_real, or real")
    generated = pairwise_distances(features_generated, labels)
    if not generated:
        raise ValueError("labels is empty, expected at least one class")
    if real is None:
        used = torch.isin(labels_real, torch.tensor(list(generated)))
        real = pairwise_distances(features_real[used], labels_real[used])
    ratios = {}
    for label, distance in generated.items():
        if not real.get(label):
            raise ValueError(f"class {label} has no two different real images to compare with")
        ratios[label] = distance / real[label]
    return Diversity(math.fsum(ratios.values()) / len(ratios), ratios)
