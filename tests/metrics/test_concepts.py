"""Scores of concepts against numbers worked out by hand and exact combinatorics."""

import math

import numpy as np
import pytest
import torch

from pecker_fast.metrics.concepts import (
    celebrity_scores,
    clip_score,
    inappropriate_probability,
    max_expected_inappropriateness,
    nudity_scores,
)


def test_celebrity_scores_by_hand():
    # Two of five images have no face; the face with the largest probability counts, even if it is 0.
    scores = celebrity_scores([[0.5, 0.75], [], [0.0], [], [0.25]])
    assert scores == {"no_face_share": 0.4, "gcd_score": pytest.approx((0.75 + 0.0 + 0.25) / 3, abs=1e-15)}
    assert celebrity_scores([[], []]) == {"no_face_share": 1.0, "gcd_score": None}
    with pytest.raises(ValueError, match="at least one image"):
        celebrity_scores([])
    with pytest.raises(ValueError, match=r"probability 1\.5"):
        celebrity_scores([[1.5]])
    with pytest.raises(ValueError, match="probability nan"):
        celebrity_scores([[math.nan]])


def distribution_of_the_maximum(shares, size):
    """Exact values and probabilities of the maximum over a random subset of ``size`` entries."""
    values = sorted(set(shares))
    at_most = [math.comb(sum(share <= value for share in shares), size) for value in values]
    return np.array(values), np.diff([0, *at_most]) / math.comb(len(shares), size)


@pytest.mark.parametrize("size", [1, 4, 25])
def test_max_expected_inappropriateness_is_the_expectation(size):
    unsafe = torch.rand(80, 10) < torch.rand(80, 1) ** 3
    mean, spread = max_expected_inappropriateness(unsafe, prompts=size, seed=int(torch.randint(10**6, ())))
    values, chances = distribution_of_the_maximum((100 * unsafe.double().mean(1)).tolist(), size)
    expected = (values * chances).sum()
    squares = (values - expected) ** 2
    variance = (squares * chances).sum()
    # Within six standard errors over 10,000 draws.
    assert abs(mean - expected) <= 6 * math.sqrt(variance) / 100 + 1e-9
    assert abs(spread**2 - variance) <= 6 * math.sqrt((squares**2 * chances).sum() - variance**2) / 100 + 1e-9
    if size == 1:
        assert abs(expected - inappropriate_probability(unsafe)) < 1e-9


def test_max_expected_inappropriateness_of_all_prompts_is_the_maximum():
    unsafe = torch.zeros(25, 10, dtype=torch.bool)
    unsafe[7, :3] = True
    assert max_expected_inappropriateness(unsafe, draws=10) == (30.0, 0.0)
    one = max_expected_inappropriateness(torch.rand(60, 3) < 0.1, prompts=2, draws=50, seed=3)
    assert one[1] > 0
    unsafe = torch.rand(60, 3) < 0.5
    results = [max_expected_inappropriateness(unsafe, prompts=2, draws=50, seed=s) for s in (1, 1, 2)]
    assert results[0] == results[1] != results[2]
    with pytest.raises(ValueError, match="prompts is 25"):
        max_expected_inappropriateness(torch.zeros(24, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="draws is 1"):
        max_expected_inappropriateness(unsafe, draws=1)


def test_nudity_scores():
    unsafe = torch.zeros(25, 4, dtype=torch.bool)
    unsafe[0] = True
    assert nudity_scores(unsafe) == {
        "inappropriate_probability": 4.0,
        "max_expected_inappropriateness": 100.0,
        "max_expected_inappropriateness_sd": 0.0,
    }
    few = nudity_scores(unsafe[:24])
    assert few["max_expected_inappropriateness"] is None and few["inappropriate_probability"] > 4
    with pytest.raises(TypeError, match=r"float32, expected bool"):
        inappropriate_probability(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        inappropriate_probability(torch.zeros(3, dtype=torch.bool))


def test_clip_score_by_hand_and_by_numpy():
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    # Cosines 0.6 and -1; negative ones count as 0.
    assert clip_score(images, texts) == pytest.approx(30.0, abs=1e-12)
    a, b = torch.randn(9, 5), torch.randn(9, 5)
    x, y = a.double().numpy(), b.double().numpy()
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert clip_score(a, b) == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-12)
    assert clip_score(4 * a, b) == pytest.approx(clip_score(a, b), rel=1e-12)
    with pytest.raises(ValueError, match="image_features has shape"):
        clip_score(a, b[:8])
