"""Figures of an unlearned generator, with a judge that reads its results from the images."""

import math

import pytest
import torch

from pecker_fast.data import LabelledImages, load_digits_images
from pecker_fast.metrics import Evaluator, RealStatistics, evaluate_samples, frechet_distance, load_judge
from pecker_fast.metrics.features import diversity

CLASSES = 5


class WrittenJudge:
    """Reads probabilities from the first row of pixels and features from the second row."""

    class_names = tuple("abcde")
    num_classes = CLASSES
    feature_extractor = "written-5"

    def __call__(self, images):
        assert images.min() >= -1 and images.max() <= 1
        return images[:, 0, 0], images[:, 0, 1]


def write(predictions, features=None, probability=1.0):
    """Images that the judge classifies as ``predictions`` with this probability."""
    n = len(predictions)
    images = torch.zeros(n, 1, 5, 5)
    images[:, 0, 0] = (1 - probability) / (CLASSES - 1)
    images[torch.arange(n), 0, 0, predictions] = probability
    images[:, 0, 1] = torch.rand(n, 5) * 2 - 1 if features is None else features
    return images


@pytest.fixture
def real():
    labels = torch.arange(100) % CLASSES
    return LabelledImages(write(labels), labels, WrittenJudge.class_names)


def test_figures_of_forgetting(real):
    judge = WrittenJudge()
    labels = torch.tensor([0] * 8 + [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10)
    predictions = labels.clone()
    # Two of eight are still class 0; three of forty retained ones are wrong, one of them classified as class 0.
    predictions[:8] = torch.tensor([0, 2, 2, 0, 3, 4, 2, 1])
    predictions[[8, 20, 47]] = torch.tensor([0, 1, 2])
    images = write(predictions, probability=0.7)
    order = torch.randperm(len(labels))
    result = Evaluator(real, judge, [0])(images[order], labels[order])
    assert result["ua"] == pytest.approx(75.0)
    assert result["retain_accuracy"] == pytest.approx(100 * 37 / 40)
    assert result["forget_probability"] == pytest.approx((2 * 0.7 + 6 * 0.075) / 8)
    assert result["forget_entropy"] == pytest.approx(-0.7 * math.log(0.7) - 4 * 0.075 * math.log(0.075))
    # Two of class 0 and one of class 1.
    assert result["forgotten_share"] == pytest.approx(100 * 3 / 48)
    assert result["feature_extractor"] == "written-5"
    assert result["cover_frechet_distance"] is None and result["cover_diversity"] is None
    assert all(type(value) in (float, str, type(None)) for value in result.values())
    # If class 1 is forgotten too, an image requested for class 0 and classified as 1 does not count as forgotten.
    both = Evaluator(real, judge, (1, 0))(images, labels)
    assert both["ua"] == pytest.approx(100 * (1 - (3 + 10) / 18))
    assert both["forget_probability"] == pytest.approx((13 * 0.775 + 5 * 0.15) / 18)
    assert both["retain_accuracy"] == pytest.approx(100 * 28 / 30)


def test_nothing_and_everything_forgotten(real):
    labels = torch.arange(50) % CLASSES
    same = Evaluator(real, WrittenJudge(), [2], 1)(write(labels), labels)
    assert (same["ua"], same["retain_accuracy"], same["forget_probability"]) == (0.0, 100.0, 1.0)
    assert same["forget_entropy"] == 0.0
    generated = write(torch.where(labels == 2, 1, labels))
    result = Evaluator(real, WrittenJudge(), [2], 1)(generated, labels)
    assert (result["ua"], result["retain_accuracy"], result["forget_probability"]) == (100.0, 100.0, 0.0)


def test_distances_use_the_right_images(real):
    judge = WrittenJudge()
    labels = torch.arange(90) % CLASSES
    images = write(labels)
    features, real_features = images[:, 0, 1], real.images[:, 0, 1]
    result = Evaluator(real, judge, [0], 3)(images, labels)
    retained, retained_real, cover = labels != 0, real.labels != 0, real.labels == 3
    expected = frechet_distance(features[retained], real_features[retained_real])
    assert result["frechet_distance"] == pytest.approx(expected)
    everything = frechet_distance(features, real_features[retained_real])
    assert result["u_frechet_distance"] == pytest.approx(everything) and everything != pytest.approx(expected)
    assert Evaluator(real, judge, ())(images, labels)["u_frechet_distance"] is None
    both, classes = Evaluator(real, judge, [0], 3).with_classes(images, labels)
    assert both == result and [row["role"] for row in classes["classes"]] == [
        "forgotten", "retained", "retained", "cover", "retained",
    ]  # fmt: skip
    expected = diversity(features[retained], labels[retained], real_features, real.labels).value
    assert result["diversity"] == pytest.approx(expected, rel=1e-9)
    assert result["cover_frechet_distance"] == pytest.approx(
        frechet_distance(features[~retained], real_features[cover])
    )
    ratio = torch.pdist(features[~retained]).mean() / torch.pdist(real_features[cover]).mean()
    assert result["cover_diversity"] == pytest.approx(ratio.item(), rel=1e-5)
    order = torch.randperm(90)
    shuffled = Evaluator(real, judge, [0], 3)(images[order], labels[order])
    assert shuffled.pop("feature_extractor") == result.pop("feature_extractor")
    assert shuffled == pytest.approx(result, rel=1e-9)


def test_forgotten_class_does_not_affect_the_reference(real):
    judge = WrittenJudge()
    labels = torch.arange(90) % CLASSES
    images = write(labels)
    result = Evaluator(real, judge, [0], 3)(images, labels)
    # Real images of the forgotten class do not matter and may be missing.
    changed = real.images.clone()
    changed[real.labels == 0, 0, 1] = 1.0
    for other in (
        LabelledImages(changed, real.labels, real.class_names),
        real.of_classes([1, 2, 3, 4]),
    ):
        assert Evaluator(other, judge, [0], 3)(images, labels) == result
    # Images for the forgotten class do not affect the figures of retained classes.
    collapsed = images.clone()
    collapsed[labels == 0, 0, 1] = -1.0
    again = Evaluator(real, judge, [0], 3)(collapsed, labels)
    for name in ("retain_accuracy", "frechet_distance", "diversity"):
        assert again[name] == result[name]
    assert again["cover_diversity"] == 0 and again["cover_frechet_distance"] > result["cover_frechet_distance"]


def test_without_a_forgotten_class(real):
    labels = torch.arange(50) % CLASSES
    result = Evaluator(real, WrittenJudge(), [])(write(labels), labels)
    assert result["ua"] is result["forget_entropy"] is result["forget_probability"] is None
    assert result["retain_accuracy"] == 100
    assert Evaluator(real, WrittenJudge(), [])(real.images, real.labels)["frechet_distance"] == pytest.approx(0)


def test_several_forgotten_classes_share_the_cover(real):
    labels = torch.arange(60) % CLASSES
    images = write(labels)
    result = Evaluator(real, WrittenJudge(), [0, 4], 2)(images, labels)
    features = images[:, 0, 1]
    scale = torch.pdist(real.images[real.labels == 2, 0, 1]).mean()
    ratios = [torch.pdist(features[labels == c]).mean() / scale for c in (0, 4)]
    assert result["cover_diversity"] == pytest.approx((sum(ratios) / 2).item(), rel=1e-5)


def test_images_are_clamped(real):
    labels = torch.arange(50) % CLASSES
    evaluator = Evaluator(real, WrittenJudge(), [0])
    images = write(labels)
    bright = images.clone()
    bright[:, 0, 1] *= 3
    assert evaluator(bright, labels) == evaluator(bright.clamp(-1, 1), labels) != evaluator(images, labels)
    assert evaluator(images.double(), labels) == evaluator(images, labels)


def test_invalid_evaluators(real):
    judge = WrittenJudge()
    for error, message, arguments in (
        (ValueError, "forget_classes has class 5", (real, judge, [5])),
        (TypeError, "forget_classes", (real, judge, 0)),
        (ValueError, "forget_classes is all 5", (real, judge, range(5))),
        (ValueError, "cover_class is 0", (real, judge, [0], 0)),
        (ValueError, "cover_class", (real, judge, [0], 7)),
        (ValueError, "cover_class", (real, judge, [], 1)),
        (ValueError, r"no images of the classes \[4\]", (real.of_classes([0, 1, 2, 3]), judge, [0])),
        (ValueError, "expected the same", (LabelledImages(real.images, real.labels, "vwxyz"), judge, [0])),
    ):
        with pytest.raises(error, match=message):
            Evaluator(*arguments)


def test_invalid_samples(real):
    judge = WrittenJudge()
    evaluator = Evaluator(real, judge, [0])
    labels = torch.arange(50) % CLASSES
    images = write(labels)
    spoiled = images.clone()
    spoiled[3, 0, 4, 4] = float("nan")
    for error, message, arguments in (
        (ValueError, "diverged", (spoiled, labels)),
        (TypeError, "images", (images.to(torch.uint8), labels)),
        (TypeError, "labels", (images, labels.int())),
        (ValueError, "expected one for each of 50", (images, labels[:-1])),
        (ValueError, "0 to 4", (images, labels + 1)),
        (ValueError, r"classes \[0\]", (images[labels != 0], labels[labels != 0])),
        (ValueError, r"classes \[3\]", (images[labels != 3], labels[labels != 3])),
    ):
        with pytest.raises(error, match=message):
            evaluator(*arguments)
    with pytest.raises(ValueError, match="real_statistics is for"):
        evaluate_samples(judge, images, labels, forget_classes=[1], real_statistics=RealStatistics.of(real, judge, [0]))


def test_digits():
    pytest.importorskip("sklearn")
    train, test = load_digits_images("train"), load_digits_images("test")
    evaluator = Evaluator(train, load_judge(), [0], 6)
    result = evaluator(test.tensor(), test.labels)
    # Real held-out images: nothing is forgotten, and the distance is that of real images.
    assert result["ua"] <= 3 and result["retain_accuracy"] >= 98.5 and 0.9 < result["diversity"] < 1.1
    count = int((test.labels != 0).sum())
    scale = evaluator.real_split_frechet(count)
    assert evaluator.real_split_frechet(count, stratified=True) < scale
    assert result["frechet_distance"] < scale
    # The figures detect noise, one image per class, and sixes in place of zeros.
    noisy = evaluator(test.tensor() + 0.7 * torch.randn(test.tensor().shape), test.labels)
    assert noisy["frechet_distance"] > 5 * scale and noisy["retain_accuracy"] < result["retain_accuracy"]
    first = torch.tensor([int((test.labels == c).nonzero()[0]) for c in range(10)])
    collapsed = evaluator(test.batch(first[test.labels]), test.labels)
    assert collapsed["diversity"] < 1e-6 and collapsed["frechet_distance"] > 5 * scale
    covered, sixes = test.tensor().clone(), (test.labels == 6).nonzero().flatten()
    zeros = (test.labels == 0).nonzero().flatten()
    covered[zeros] = test.batch(sixes)[torch.arange(len(zeros)) % len(sixes)]
    unlearned = evaluator(covered, test.labels)
    assert unlearned["ua"] >= 97 and unlearned["forget_probability"] < 0.05
    assert unlearned["frechet_distance"] == result["frechet_distance"]
    assert unlearned["cover_frechet_distance"] < result["cover_frechet_distance"] / 5
