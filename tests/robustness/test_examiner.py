"""Confusion, what is read off it, and samplers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import Sampler
from pecker_fast.metrics import FeatureStatistics
from pecker_fast.robustness import confusion_matrix, paths, retained_accuracy, samplers, unlearning_accuracy
from tests.robustness.toy import MeanJudge, affine, examiner, generated


def test_confusion_and_accuracies_by_hand():
    levels = torch.empty(60).uniform_(-1, 1)
    images = levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    labels = torch.randint(3, (60,))
    labels[:3] = torch.arange(3)
    confusion = confusion_matrix(MeanJudge(), images, labels)
    expected = np.zeros((3, 3), dtype=int)
    for level, label in zip(levels.tolist(), labels.tolist(), strict=True):
        expected[label, int(np.argmin(np.abs(level - np.array([-0.7, 0.0, 0.7]))))] += 1
    assert (confusion.numpy() == expected).all()
    still = expected[[0, 2]][:, [0, 2]].sum() / expected[[0, 2]].sum()
    assert unlearning_accuracy(confusion, (0, 2)) == pytest.approx(100 - 100 * still)
    assert retained_accuracy(confusion, (0, 2)) == pytest.approx(100 * expected[1, 1] / expected[1].sum())
    kept = (expected[1, 1] + expected[2, 2]) / expected[1:].sum()
    assert retained_accuracy(confusion, (0,)) == pytest.approx(100 * kept)
    with pytest.raises(ValueError, match="not finite"):
        confusion_matrix(MeanJudge(), images / 0, labels)


def test_it_judges_what_the_network_draws():
    network, found = affine(0.2, (2.0, 0.0, -2.0)), examiner(forget_samples=5, retain_samples=3)
    labels = found.labels
    assert labels.tolist() == [0] * 5 + [1] * 3 + [2] * 3
    confusion = found.confusion(network)
    assert confusion.sum(1).tolist() == [5, 3, 3]
    assert torch.equal(confusion, found.confusion(network))
    # v = +-2: means far from 0 whatever the noise.
    drawn = generated(network, torch.zeros(3, 1, 4, 4), torch.arange(3)).mean((1, 2, 3))
    assert drawn[0] < -0.6 and drawn[2] > 0.6
    assert confusion[0, 0] == 5 and confusion[2, 2] == 3
    assert found.accuracies(confusion)["ua"] == 0
    assert found.accuracies(found.confusion(affine(0.2, (-2.0, 0.0, -2.0))))["ua"] == 100


def test_other_samplers():
    found = examiner()
    names = [sampler.name for sampler in samplers(found)]
    assert names == ["one step at 25", "DDIM, 5 steps", "one step at 12", "one step at 38", "one step at 49"]
    assert [s.name for s in samplers(examiner(None))] == ["DDIM, 5 steps", "DDIM, 10 steps", "DDIM, 50 steps"]
    assert found.by_ddim == examiner(None).sampler == examiner(None).by_ddim
    # An embedding that is right for one step at 25 is not for other ways to sample; the rows say so.
    rows = paths(affine(0.2, (2.0, 0.0, -2.0)), found)
    assert [row["sampler"] for row in rows] == names
    assert rows[0]["still"] == 100
    expected = found.accuracies(found.confusion(affine(0.2, (2.0, 0.0, -2.0)), found.sampler.at(49)))
    assert rows[4]["still"] == 100 - expected["ua"] and rows[4]["retain_accuracy"] == expected["retain_accuracy"]


def test_wrong_inputs():
    with pytest.raises(ValueError, match="t_init is 50, expected from 0 to 49"):
        examiner(50)
    for steps in (0, 51):
        with pytest.raises(ValueError, match=f"num_inference_steps is {steps}"):
            examiner(num_inference_steps=steps)
    with pytest.raises(ValueError, match="num_inference_steps is 51"):
        replace(examiner(), sampler=Sampler("ddim", num_inference_steps=51))
    for name in ("forget_samples", "retain_samples"):
        with pytest.raises(ValueError, match=name):
            examiner(**{name: 0})
    with pytest.raises(ValueError, match="knows 3 classes, the network 4"):
        from pecker_fast.unlearning import ForgetRequest

        replace(examiner(), request=ForgetRequest(4, (0,), 1))


def test_measure_has_the_distance_from_the_real_class():
    network = affine(0.2, (2.0, 0.0, -2.0))
    assert examiner().measure(network)["forget_frechet"] is None
    found = examiner(forget_samples=300)
    images = found.draw(network, torch.zeros(400, dtype=torch.int64), 11)
    real = FeatureStatistics.of(MeanJudge()(images)[1])
    with_real = replace(found, forgotten_real=real)
    measured = with_real.measure(network)
    assert {**measured, "forget_frechet": None} == found.measure(network)
    # Like real ones; unlike them once the class is drawn otherwise, by the distance of the means at least.
    other = with_real.measure(affine(0.2, (-2.0, 0.0, -2.0)))
    assert measured["forget_frechet"] < 0.1 and other["forget_frechet"] > 2 * 1.3**2
