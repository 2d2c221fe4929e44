"""Files of concepts to forget at once: what is read, and errors that name the line."""

import pytest

from pecker_fast.data.prompts import evaluation_prompts, load_concepts, names_concept, near_celebrities


def test_lines(tmp_path):
    path = tmp_path / "concepts.txt"
    path.write_text(
        '# two people and a style\nBrad Pitt, a middle aged man\n\nangelina jolie\n"Gogh, Vincent van",  a painting \n'
    )
    assert load_concepts(path) == (
        ("Brad Pitt", "a middle aged man"),
        ("angelina jolie", "a middle aged woman"),
        ("Gogh, Vincent van", "a painting"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a, b\nc, d, e\n", r"line 2: 'c, d, e' has 3 texts, expected concept, cover"),
        ("a, b\n\nc,\n", r"line 3: 'c,' has an empty text, expected concept, cover"),
        ("somebody unknown\n", r"line 1: 'somebody unknown' has no cover"),
        ("brad pitt\nBrad  Pitt, x\n", r"line 2: 'Brad  Pitt' is in line 1 already"),
        ("a cat, a dog\na dog, a bird\n", r"line 1: the cover 'a dog' names 'a dog', which is to be forgotten"),
        ("cat, a black Cat\n", r"line 1: the cover 'a black Cat' names 'cat'"),
        ('"a, b\n', r"line 1: '\"a, b' cannot be read"),
        ("# nothing\n", "has no concept"),
    ],
)
def test_errors_name_the_line(tmp_path, text, message):
    path = tmp_path / "concepts.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_concepts(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"concepts is '.*none\.txt', and there is no such file"):
        load_concepts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("é, b".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_concepts(tmp_path / "latin.txt")


def test_neighbours_are_not_forgotten():
    all_men = near_celebrities("brad pitt")
    other = all_men[0]
    assert other not in near_celebrities("brad pitt", [other.title()]) and len(all_men) > 1
    result = evaluation_prompts("celebrity", "brad pitt", forgotten=[other])
    assert other not in result.near_concepts and not any(names_concept(text, other) for text in result.near)


def test_a_given_neighbour_may_not_be_forgotten(tmp_path):
    (tmp_path / "near.txt").write_text("tom cruise\nmatt damon\n")
    with pytest.raises(ValueError, match="near names 'Matt Damon', a concept to forget"):
        evaluation_prompts("celebrity", "brad pitt", near=tmp_path / "near.txt", forgotten=["Matt Damon"])
