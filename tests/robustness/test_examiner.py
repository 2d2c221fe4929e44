"""Confusion matrices, accuracies, and samplers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import Sampler
from pecker_fast.metrics import FeatureStatistics, retained_accuracy, unlearning_accuracy
from pecker_fast.robustness import confusion_matrix, paths, samplers
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
    correct = (expected[1, 1] + expected[2, 2]) / expected[1:].sum()
    assert retained_accuracy(confusion, (0,)) == pytest.approx(100 * correct)
    with pytest.raises(ValueError, match="not finite"):
        confusion_matrix(MeanJudge(), images / 0, labels)


def test_confusion_of_a_network():
    network, subject = affine(0.2, (2.0, 0.0, -2.0)), examiner(forget_samples=5, retain_samples=3)
    labels = subject.labels
    assert labels.tolist() == [0] * 5 + [1] * 3 + [2] * 3
    confusion = subject.confusion(network)
    assert confusion.sum(1).tolist() == [5, 3, 3]
    assert torch.equal(confusion, subject.confusion(network))
    # With v = +-2 the means are far from 0 for any noise.
    means = generated(network, torch.zeros(3, 1, 4, 4), torch.arange(3)).mean((1, 2, 3))
    assert means[0] < -0.6 and means[2] > 0.6
    assert confusion[0, 0] == 5 and confusion[2, 2] == 3
    assert subject.accuracies(confusion)["ua"] == 0
    assert subject.accuracies(subject.confusion(affine(0.2, (-2.0, 0.0, -2.0))))["ua"] == 100


def test_other_samplers():
    subject = examiner()
    names = [sampler.name for sampler in samplers(subject)]
    assert names == ["one step at 25", "DDIM, 5 steps", "one step at 12", "one step at 38", "one step at 49"]
    assert [s.name for s in samplers(examiner(None))] == ["DDIM, 5 steps", "DDIM, 10 steps", "DDIM, 50 steps"]
    assert subject.by_ddim == examiner(None).sampler == examiner(None).by_ddim
    # Embeddings that fit one step at 25 do not fit other samplers, and the rows show it.
    rows = paths(affine(0.2, (2.0, 0.0, -2.0)), subject)
    assert [row["sampler"] for row in rows] == names
    assert rows[0]["still"] == 100
    expected = subject.accuracies(subject.confusion(affine(0.2, (2.0, 0.0, -2.0)), subject.sampler.at(49)))
    assert rows[4]["still"] == 100 - expected["ua"] and rows[4]["retain_accuracy"] == expected["retain_accuracy"]


def test_invalid_arguments():
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
    with pytest.raises(ValueError, match="the judge has 3 classes, expected the network's 4"):
        from pecker_fast.unlearning import ForgetRequest

        replace(examiner(), request=ForgetRequest(4, (0,), 1))


def test_measure_includes_the_distance_from_real_images():
    network = affine(0.2, (2.0, 0.0, -2.0))
    assert examiner().measure(network)["forget_frechet"] is None
    subject = examiner(forget_samples=300)
    images = subject.draw(network, torch.zeros(400, dtype=torch.int64), 11)
    real = FeatureStatistics.of(MeanJudge()(images)[1])
    with_real = replace(subject, forgotten_real=real)
    result = with_real.measure(network)
    assert {**result, "forget_frechet": None} == subject.measure(network)
    # Near 0 for the same distribution; at least the distance of the means for another one.
    other = with_real.measure(affine(0.2, (-2.0, 0.0, -2.0)))
    assert result["forget_frechet"] < 0.1 and other["forget_frechet"] > 2 * 1.3**2
