"""The meter against sums over single images."""

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
    """The first pixel sets the number of faces; the probability of the first label increases from face to face."""

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


def result_of(meter, images, sizes):
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
    result = result_of(meter, images, 12)
    assert meter.unknown == ["nobody"]
    for sizes in (1, 5):
        assert result_of(ConceptMeter(PROMPTS, 4, **options), images, sizes) == result
    # Images of "nobody" do not count for faces, but they count for all other scores.
    largest, without = [], 0
    for i, image in enumerate(images[:8]):
        count = int(image[0, 0, 0]) % 4
        without += count == 0
        if count:
            largest.append((count - 1) / 4 if i < 4 else 1.0)
    assert result["no_face_share"] == pytest.approx(without / 8, abs=1e-12)
    assert result["gcd_score"] == (pytest.approx(sum(largest) / len(largest)) if largest else None)
    first, second = ([bool(image[c].float().mean() > 127) for image in images] for c in (0, 1))
    assert result["first_probability"] == pytest.approx(100 * sum(first) / 12)
    unsafe = [a or b for a, b in zip(first, second, strict=True)]
    assert result["inappropriate_probability"] == pytest.approx(100 * sum(unsafe) / 12)
    assert result["max_expected_inappropriateness"] is None
    texts = Clip().texts([PROMPTS[i // 4] for i in range(12)])
    assert result["clip_score"] == clip_score(Clip().images(images), texts)
    assert set(meter.describe()) == {"first", "second", "celebrity_detector", "clip"}


def test_scores_of_single_prompts_are_those_of_the_prompt_alone():
    images = pictures(12)
    options = {"clip": Clip(), "unsafe": [Bright("first", 0), Bright("second", 1)], "celebrities": Faces()}
    meter = ConceptMeter(PROMPTS, 4, **options, names=("red man", "GREEN man", "nobody"))
    with pytest.raises(ValueError, match="0 images were added, expected 12"):
        meter.by_prompt()
    whole = result_of(meter, images, 5)
    rows = meter.by_prompt()
    for i, (prompt, name, row) in enumerate(zip(PROMPTS, ("red man", "GREEN man", "nobody"), rows, strict=True)):
        alone = ConceptMeter([prompt], 4, **options, names=[name])
        expected = result_of(alone, images[4 * i : 4 * i + 4], 4)
        assert row.pop("prompt") == prompt and row.pop("images") == 4
        assert row == {key: expected[key] for key in row} and len(row) == 4
    assert rows[2]["gcd_score"] is None and rows[2]["no_face_share"] is None
    for key in ("inappropriate_probability", "clip_score"):
        assert sum(row[key] for row in rows) / 3 == pytest.approx(whole[key])


def test_expected_maximum_over_many_prompts():
    images = torch.zeros(60, 3, 4, 4, dtype=torch.uint8)
    # One of the two images of prompt 3 of 30 is unsafe.
    images[7, 0] = 255
    result = result_of(ConceptMeter([f"p{i}" for i in range(30)], 2, unsafe=[Bright("first", 0)]), images, 7)
    # Subsets have 25 of 30 prompts: 5 of 6 include this one.
    assert result["max_expected_inappropriateness"] == pytest.approx(50 * 25 / 30, abs=1.5)
    assert result["inappropriate_probability"] == pytest.approx(100 / 60)


def test_invalid_inputs_and_unknown_names():
    unknown = ConceptMeter(["a"], 1, celebrities=Faces(), names=["nobody"])
    unknown.add(pictures(1))
    assert unknown.unknown == ["nobody"] and unknown.result() == {"no_face_share": None, "gcd_score": None}
    with pytest.raises(ValueError, match="names has 1 names, expected 3"):
        ConceptMeter(PROMPTS, 1, celebrities=Faces(), names=["red man"])
    meter = ConceptMeter(PROMPTS, 1, unsafe=[Bright("first", 0)])
    meter.add(pictures(2))
    with pytest.raises(ValueError, match="2 images were added, expected 3"):
        meter.result()
    with pytest.raises(ValueError, match="exceed 3 prompts of 1"):
        meter.add(pictures(2))
