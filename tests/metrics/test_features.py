"""Fréchet distance and diversity against other computations."""

import math

import numpy as np
import pytest
import torch

from pecker_fast.metrics import FeatureStatistics, diversity, frechet_distance, pairwise_distances, real_split_frechet


def gaussian(n, dim, spread=1.0):
    mix = torch.randn(dim, dim, dtype=torch.float64) * spread
    return torch.randn(n, dim, dtype=torch.float64) @ mix + torch.randn(dim, dtype=torch.float64)


def frechet_by_scipy(a, b) -> float:
    """The textbook formula: the square root of a product that is not symmetric, by Schur decomposition."""
    linalg = pytest.importorskip("scipy.linalg")
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


@pytest.mark.parametrize("dim", [2, 9, 40])
def test_frechet_against_the_textbook_formula(dim):
    a, b = gaussian(300, dim), gaussian(150, dim, spread=2.0)
    expected = frechet_by_scipy(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(300)
    assert frechet_distance(a[order], b) == pytest.approx(expected, rel=1e-9)


def exact(mean, cov_root, n=64):
    """Vectors with exactly this sample mean and unbiased covariance, up to rounding."""
    dim = len(mean)
    white, _ = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, dim)], 1).double())
    return white[:, 1:] * math.sqrt(n - 1) @ cov_root + mean


def test_frechet_of_gaussians_in_closed_form():
    dim = 6
    mean_a, mean_b = torch.randn(2, dim, dtype=torch.float64)
    sd_a, sd_b = torch.rand(2, dim, dtype=torch.float64) + 0.1
    # Covariances that commute: sum (mu_a - mu_b)^2 + (sd_a - sd_b)^2, in any rotation.
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    a, b = exact(mean_a, sd_a.diag() @ rotation), exact(mean_b, sd_b.diag() @ rotation)
    expected = ((mean_a - mean_b).square().sum() + (sd_a - sd_b).square().sum()).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)
    # The distance of a shifted set is that of the shift.
    shift = torch.randn(dim, dtype=torch.float64)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-11)


def test_frechet_of_two_dimensions_by_hand():
    # In two dimensions tr (A^1/2 B A^1/2)^1/2 = sqrt(tr AB + 2 sqrt(det AB)).
    a, b = gaussian(50, 2), gaussian(70, 2)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    product = cov_a @ cov_b
    root = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_of_singular_and_badly_scaled_features():
    for scale in (1e-4, 1.0, 1e4):
        # Fewer vectors than dimensions, and a dimension without spread: singular covariances.
        a = gaussian(20, 64) * scale
        a[:, 0] = 0
        distance = frechet_distance(a, a.clone())
        assert 0 <= distance <= 1e-12 * torch.cov(a.T).trace()
    far = gaussian(500, 8)
    assert frechet_distance(far + 1e6, gaussian(500, 8) + 1e6) > 0
    assert frechet_distance(far + 1e6, far) == pytest.approx(8e12, rel=1e-9)
    # Two covariances of rank one: the distance depends on the angle between the directions.
    u, v = torch.tensor([3.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()
    line = exact(torch.zeros(1).double(), torch.eye(1).double())
    expected = u.dot(u) + v.dot(v) - 2 * u.dot(v).abs()
    assert frechet_distance(line * u, line * v) == pytest.approx(expected.item(), rel=1e-9)


def test_statistics_in_parts():
    features = gaussian(100, 5) + 1e5
    whole = FeatureStatistics.of(features)
    parts = FeatureStatistics(5)
    for part in features.split([1, 0, 40, 2, 57]):
        assert parts.update(part) is parts
    assert whole.count == parts.count == 100 and whole.cov.dtype is torch.float64
    for statistics in (whole, parts):
        np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-13)
        np.testing.assert_allclose(statistics.cov, np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-8)
    other = gaussian(30, 5)
    assert frechet_distance(parts, other) == pytest.approx(frechet_distance(features, other), rel=1e-9)


def test_invalid_features():
    good = torch.randn(10, 3)
    for error, wrong in (
        (TypeError, good.long()),
        (TypeError, good.tolist()),
        (ValueError, good[0]),
        (ValueError, good[:1]),
        (ValueError, good[:, :2]),
        (ValueError, good.index_fill(0, torch.tensor(3), float("nan"))),
        (ValueError, good.index_fill(1, torch.tensor(0), float("inf"))),
    ):
        with pytest.raises(error):
            frechet_distance(good, wrong)
        with pytest.raises(error):
            frechet_distance(wrong, good)
    with pytest.raises(ValueError, match="expected 4"):
        FeatureStatistics(4).update(good)


def brute_force(features, labels) -> dict[int, float]:
    means = {}
    for label in set(labels.tolist()):
        rows = [row for row, owner in zip(features.tolist(), labels.tolist(), strict=True) if owner == label]
        pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i]]
        means[label] = sum(math.dist(a, b) for a, b in pairs) / len(pairs)
    return means


def test_diversity_against_all_pairs():
    labels, labels_real = torch.arange(36) % 3, torch.arange(50) % 5
    features, real = torch.randn(36, 7), torch.randn(50, 7) * 2
    generated, reference = brute_force(features, labels), brute_force(real, labels_real)
    assert pairwise_distances(features, labels) == pytest.approx(generated, rel=1e-12)
    result = diversity(features, labels, real, labels_real)
    # Real classes 3 and 4 were not generated.
    assert result.per_class == pytest.approx({c: generated[c] / reference[c] for c in range(3)}, rel=1e-12)
    assert result.value == pytest.approx(sum(result.per_class.values()) / 3, rel=1e-12)
    order, order_real = torch.randperm(36), torch.randperm(50)
    shuffled = diversity(features[order], labels[order], real[order_real], labels_real[order_real])
    assert shuffled.value == pytest.approx(result.value, rel=1e-12)
    assert diversity(features, labels, real=reference).value == pytest.approx(result.value, rel=1e-12)


def test_diversity_of_known_sets():
    real, labels = torch.randn(20, 4), torch.arange(20) % 2
    assert diversity(real, labels, real, labels).value == pytest.approx(1.0)
    assert diversity(real * 0.25 + 3, labels, real, labels).value == pytest.approx(0.25, rel=1e-6)
    # One image per class, far apart: no diversity within classes.
    collapsed = labels[:, None].float().expand(20, 4) * 100
    assert diversity(collapsed, labels, real, labels).value == 0
    # Classes have equal weights, independent of their number of images.
    more = torch.cat([real, real[labels == 0] * 3]), torch.cat([labels, torch.zeros(10, dtype=torch.int64)])
    ratio = diversity(*more, real, labels)
    assert ratio.value == pytest.approx((ratio.per_class[0] + 1) / 2) and ratio.per_class[0] > 1.5


def test_invalid_diversity():
    features, labels = torch.randn(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    for arguments in (
        (features, labels),
        (features, labels, features),
        (features, labels.int(), features, labels),
        (features, labels[:5], features, labels),
        (features[:4], labels[:4], features, labels),
        (features, labels, features[:3], labels[:3]),
        (features, labels, torch.zeros(6, 2), labels),
        (features[:0], labels[:0], features, labels),
    ):
        with pytest.raises(ValueError):
            diversity(*arguments)


def test_real_split():
    features = gaussian(240, 4).float()
    value = real_split_frechet(features, 60, seed=7)
    assert real_split_frechet(features, 60, seed=7) == value != real_split_frechet(features, 60, seed=8)
    generator = torch.Generator().manual_seed(7)
    distances = []
    for _ in range(8):
        order = torch.randperm(240, generator=generator)
        distances.append(frechet_by_scipy(features[order[:60]], features[order[60:]]))
    assert value == pytest.approx(sum(distances) / 8, rel=1e-6)
    # Sampling error is larger for smaller parts.
    assert real_split_frechet(features, 10) > real_split_frechet(features, 100)
    for options in ({"count": 1}, {"count": 239}, {"repeats": 0}, {"labels": torch.zeros(3, dtype=torch.int64)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            real_split_frechet(features, **options)


def test_stratified_split_has_each_class_in_proportion():
    # Classes without spread, so far apart that their shares determine the distance.
    labels = torch.tensor([0] * 90 + [1] * 30)[torch.randperm(120)]
    features = labels[:, None].double() * torch.tensor([[100.0, 50.0]])
    # 30 and 10 in the part of 40, 60 and 20 in the rest: only the divisors n - 1 differ.
    assert real_split_frechet(features, 40, labels=labels) < 1
    assert real_split_frechet(features, 40) > 3
