"""Collateral damage computed from confusion matrices; guidance with and without a null label."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pecker_fast.data import LabelledImages
from pecker_fast.diffusion import NoiseSchedule, Sampler
from pecker_fast.metrics import Judge, SmallClassifier
from pecker_fast.robustness import Examiner, class_distances, guidance, neighbours
from pecker_fast.unlearning import ForgetRequest
from tests.diffusion.toy import tiny_unet


def judge(classes: int) -> Judge:
    return Judge(SmallClassifier(classes, 1, 8, 4), map(str, range(classes)), name="test")


def test_neighbours_by_hand():
    request = ForgetRequest(6, (1, 4), 0)
    before, after = (torch.randint(1, 9, (6, 6)) for _ in range(2))
    distances = torch.rand(6, 6, dtype=torch.float64)
    rows = neighbours(before, after, distances, request)
    order = sorted((0, 2, 3, 5), key=lambda c: min(distances[c, 1], distances[c, 4]))
    assert [row["class"] for row in rows] == order
    assert [row["neighbour"] for row in rows] == [True, True, True, False]
    for row in rows:
        c = row["class"]
        for confusion, suffix in ((before.numpy(), "_before"), (after.numpy(), "")):
            share = 100 * confusion[c] / confusion[c].sum()
            assert row["accuracy" + suffix] == pytest.approx(share[c])
            assert row["called_forgotten" + suffix] == pytest.approx(share[1] + share[4])
            assert row["called_cover" + suffix] == (None if c == 0 else pytest.approx(share[0]))
        assert row["distance"] == min(distances[c, 1], distances[c, 4])
    assert "called_cover" not in neighbours(before, after, distances, ForgetRequest(6, (1,), None))[0]


def test_class_distances():
    images, labels = torch.empty(20, 1, 8, 8).uniform_(-1, 1), torch.randint(3, (20,))
    labels[:3] = torch.arange(3)
    classifier = judge(3)
    distances = class_distances(classifier, LabelledImages(images, labels, tuple("012")), chunk=7)
    features = classifier(images)[1].double().numpy()
    means = [features[labels.numpy() == c].mean(0) for c in range(3)]
    expected = [[np.linalg.norm(p - q) for q in means] for p in means]
    np.testing.assert_allclose(distances.numpy(), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"classes \[1\]"):
        class_distances(classifier, LabelledImages(images, labels.clamp(max=0) + (labels > 0) * 2, tuple("012")))


def test_guidance():
    schedule, sampler = NoiseSchedule.linear(50), Sampler("one_step", t_init=25, batch_size=16)
    examiner = Examiner(judge(3), ForgetRequest(3, (1,), 0), schedule, sampler, 3, 1, 9, 4)
    assert guidance(tiny_unet(), examiner, (0.0, 1.0)) == []
    network = tiny_unet(null_label=True)
    with torch.no_grad():
        # Make the null label's row matter.
        network.class_embedding.weight.mul_(30)
    for own in (sampler, examiner.by_ddim):
        examiner = replace(examiner, sampler=own)
        rows = guidance(network, examiner, (0.0, 1.0, 3.0))
        assert [row["scale"] for row in rows] == [0.0, 1.0, 3.0, None]
        assert [row["retain_accuracy"] is None for row in rows] == [True, False, False, True]
        unguided = examiner.accuracies(examiner.confusion(network))
        assert rows[1]["still"] == pytest.approx(100 - unguided["ua"])
        assert rows[1]["retain_accuracy"] == unguided["retain_accuracy"]
        # At scale 0 the label has no influence.
        assert rows[0]["still"] == rows[3]["still"]
        images = [
            examiner.draw(network, torch.full((4,), c), 5, replace(own, guidance_scale=scale))
            for c, scale in ((1, 0.0), (3, 1.0), (1, 1.0))
        ]
        torch.testing.assert_close(images[0], images[1], rtol=1e-4, atol=1e-4)
        assert (images[0] - images[2]).abs().max() > 1e-3
