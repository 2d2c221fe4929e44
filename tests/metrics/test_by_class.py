"""The table of classes, the confusion row of forgotten classes, and PUL, by hand."""

import pytest
import torch

from pecker_fast.metrics import class_figures, forgotten_share, percentage_of_unlearning

NAMES = ("cat", "dog", "class", "emu")


def one_hot(predictions: list[int], probability: float = 0.7) -> torch.Tensor:
    result = torch.full((len(predictions), 4), (1 - probability) / 3)
    result[torch.arange(len(predictions)), predictions] = probability
    return result


def test_classes_and_what_the_forgotten_one_is_drawn_as():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3, 3, 3, 3])
    predictions = [1, 1, 0, 3, 1, 1, 3, 3, 1, 0, 1]
    result = class_figures(one_hot(predictions), labels, (0,), 1, NAMES)
    cat, dog, emu = result["classes"]
    assert (cat["class"], cat["role"], cat["images"], cat["called"]) == ("cat", "forgotten", 4, "dog")
    assert (cat["accuracy"], cat["called_share"]) == (25.0, 50.0)
    assert cat["probability"] == pytest.approx((0.7 + 3 * 0.1) / 4)
    assert (dog["role"], dog["accuracy"], dog["called"], dog["called_share"]) == ("cover", 100.0, None, 0.0)
    assert (emu["role"], emu["images"], emu["called"]) == ("retained", 5, "dog")
    assert (emu["accuracy"], emu["called_share"]) == (pytest.approx(40), pytest.approx(40))
    (row,) = result["drawn_as"]
    assert row == {"class": "cat", "shares": {"cat": 25.0, "dog": 50.0, "class": 0.0, "emu": 25.0}}
    assert class_figures(one_hot(predictions), labels, (), None, NAMES)["drawn_as"] == []


def test_percentage_of_unlearning():
    assert forgotten_share(one_hot([0, 1, 2, 0, 3]), (0, 3)) == pytest.approx(60.0)
    assert percentage_of_unlearning(10.0, 0.0) == 100 and percentage_of_unlearning(10.0, 2.5) == 75
    assert percentage_of_unlearning(10.0, 12.0) == pytest.approx(-20)
    for before, after in ((None, 1.0), (1.0, None), (0.0, 0.0)):
        assert percentage_of_unlearning(before, after) is None
