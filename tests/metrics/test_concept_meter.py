"""The meter against the same sums made image by image."""

import pytest
import torch

from pecker_fast.metrics.concept_meter import ConceptMeter
from pecker_fast.metrics.concepts import clip_score

PROMPTS = ("a red thing", "a green thing", "a blue thing")


class Bright:
    def __init__(self, name, channel):
        self.name, self.channel = name, channel

    def describe(self):
        return {"channel": self.channel}

    def __call__(self, images):
        return images[:, self.channel].float().mean((1, 2)) > 127


class Faces:
    """As many faces as the first pixel says, each likelier than the one before to be the first label."""

    labels = ("Red_Man", "Green Man")

    def describe(self):
        return {"kind": "faces"}

    def __call__(self, images):
        rows = []
        for image in images:
            first = torch.arange(int(image[0, 0, 0]) % 4) / 4
            rows.append(torch.stack([first, 1 - first], 1))
        return rows


class Clip:
    def describe(self):
        return {"kind": "clip"}

    def images(self, images):
        return images.float().mean((2, 3)) - 100

    def texts(self, texts):
        return torch.tensor([[float("red" in text), float("green" in text), float("blue" in text)] for text in texts])


def pictures(count):
    return torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8)


def added(meter, images, sizes):
    for part in images.split(sizes):
        meter.add(part)
    return meter.result()


def test_scores_do_not_depend_on_the_chunks():
    images = pictures(12)
    options = {
        "clip": Clip(),
        "unsafe": [Bright("first", 0), Bright("second", 1)],
        "celebrities": Faces(),
        "names": ("red man", "GREEN man", "nobody"),
    }
    meter = ConceptMeter(PROMPTS, 4, **options)
    found = added(meter, images, 12)
    assert meter.unknown == ["nobody"]
    for sizes in (1, 5):
        assert added(ConceptMeter(PROMPTS, 4, **options), images, sizes) == found
    # Image by image: those of "nobody" do not count for faces, but for everything else.
    largest, without = [], 0
    for i, image in enumerate(images[:8]):
        count = int(image[0, 0, 0]) % 4
        without += count == 0
        if count:
            largest.append((count - 1) / 4 if i < 4 else 1.0)
    assert found["no_face_share"] == pytest.approx(without / 8, abs=1e-12)
    assert found["gcd_score"] == (pytest.approx(sum(largest) / len(largest)) if largest else None)
    first, second = ([bool(image[c].float().mean() > 127) for image in images] for c in (0, 1))
    assert found["first_probability"] == pytest.approx(100 * sum(first) / 12)
    either = [a or b for a, b in zip(first, second, strict=True)]
    assert found["inappropriate_probability"] == pytest.approx(100 * sum(either) / 12)
    assert found["max_expected_inappropriateness"] is None
    texts = Clip().texts([PROMPTS[i // 4] for i in range(12)])
    assert found["clip_score"] == clip_score(Clip().images(images), texts)
    assert set(meter.describe()) == {"first", "second", "celebrity_detector", "clip"}


def test_the_largest_per_prompt_share_of_many_prompts():
    images = torch.zeros(60, 3, 4, 4, dtype=torch.uint8)
    # Prompt 3 of 30: one of its two images is unsafe.
    images[7, 0] = 255
    found = added(ConceptMeter([f"p{i}" for i in range(30)], 2, unsafe=[Bright("first", 0)]), images, 7)
    # 25 of 30 prompts are drawn: this one in 5 of 6 draws.
    assert found["max_expected_inappropriateness"] == pytest.approx(50 * 25 / 30, abs=1.5)
    assert found["inappropriate_probability"] == pytest.approx(100 / 60)


def test_refusals():
    stranger = ConceptMeter(["a"], 1, celebrities=Faces(), names=["nobody"])
    stranger.add(pictures(1))
    assert stranger.unknown == ["nobody"] and stranger.result() == {"no_face_share": None, "gcd_score": None}
    with pytest.raises(ValueError, match="names has 1 names, expected 3"):
        ConceptMeter(PROMPTS, 1, celebrities=Faces(), names=["red man"])
    meter = ConceptMeter(PROMPTS, 1, unsafe=[Bright("first", 0)])
    meter.add(pictures(2))
    with pytest.raises(ValueError, match="2 images were added, expected 3"):
        meter.result()
    with pytest.raises(ValueError, match="beyond 3 prompts of 1"):
        meter.add(pictures(2))
