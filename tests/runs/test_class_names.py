"""Classes by name or number, on the command line and from Python."""

import unicodedata

import pytest

from pecker_fast.runs.classes.names import cover_of, label_of, labels_of, listed, proper_names

NAMES = ("astronaut", "café", "кошка")
# Folders of numbers are in the order of texts.
NUMBERS = ("0", "1", "10", "2")


def label(value, names=NAMES):
    return label_of(value, names, "forget_classes")


def test_a_name_or_a_number():
    assert (
        [label(name) for name in NAMES] == [label(text) for text in "012"] == [label(n) for n in range(3)] == [0, 1, 2]
    )
    assert label(unicodedata.normalize("NFD", "café")) == label(" café ") == label("name:café") == 1
    assert label_of("7", (), "forget_classes") == 7 and labels_of(["кошка", 0], NAMES) == (2, 0)
    assert (cover_of("random", NAMES), cover_of(None), cover_of("café", NAMES), cover_of(1)) == (None, None, 1, 1)


def test_names_that_are_numbers():
    assert [label(text, NUMBERS) for text in ("0", "1", "10")] == [0, 1, 2]
    # From Python a number is a label.
    assert label(2, NUMBERS) == 2
    with pytest.raises(
        ValueError, match="'2', the name of the class with the number 3 and the number of the class '10'"
    ):
        label("2", NUMBERS)
    assert (label("name:2", NUMBERS), label("label:2", NUMBERS)) == (3, 2)


def test_classes_that_there_are_not():
    with pytest.raises(
        ValueError, match=r"^forget_classes is 'dog', expected one of the classes astronaut, café, кошка"
    ):
        label("dog")
    with pytest.raises(ValueError, match=r"^forget_classes is 'dog', expected the number of a class$"):
        label("dog", ())
    with pytest.raises(ValueError, match=r'^cover_class is \'dog\', expected one of .*, or "random"$'):
        cover_of("dog", NAMES)
    with pytest.raises(TypeError, match=r"forget_classes is 'café', expected several classes: \['café'\]"):
        labels_of("café", NAMES)


def test_lists_for_messages():
    assert listed(NAMES) == "astronaut, café, кошка"
    assert listed([str(i) for i in range(14)]).endswith("10, 11 and 2 more")
    assert proper_names(["0", "1"]) == () == proper_names(()) and proper_names(["1", "0"]) == ("1", "0")
