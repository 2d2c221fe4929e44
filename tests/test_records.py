"""JSON read through records: what is accepted, and one line for what is not."""

import json
import random
import re
from typing import Annotated, Any, Literal, TypedDict

import pytest
from typing_extensions import NotRequired

from pecker_fast.records import (
    COUNT,
    MAX_BYTES,
    SHA256,
    RecordError,
    Rule,
    check_object,
    interpreting,
    read_lines,
    read_object,
)


class Inner(TypedDict):
    share: float
    name: NotRequired[str | None]


class Record(TypedDict, total=False):
    step: COUNT
    hash: SHA256
    kind: Literal["a", "b"]
    inner: Inner
    many: list[Inner]
    by_name: dict[str, Inner]
    either: int | list[int] | None
    free: Any
    odd: Annotated[int, Rule("an odd number", lambda value: value % 2)]


WHOLE = {
    "step": 3,
    "hash": "0" * 64,
    "kind": "a",
    "inner": {"share": 1, "name": None},
    "many": [{"share": 0.5}],
    "by_name": {"x": {"share": 2.0, "name": "y", "later": 1}},
    "either": [1, 2],
    "free": {"anything": []},
    "odd": 3,
    "unknown": "of a later version",
}


def test_whole_records(tmp_path):
    path = tmp_path / "a.json"
    for value in (WHOLE, {}, {"either": None}, {"either": 4}, {"step": (1 << 63) - 1}):
        path.write_text(json.dumps(value))
        assert read_object(path, Record) == value == read_object(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step is -1, expected an integer of at least 0"),
        ({"step": True}, "step is true, expected an integer of at least 0"),
        ({"step": 1.5}, "step is 1.5, expected an integer"),
        ({"hash": 5}, "hash is 5, expected a sha256"),
        ({"hash": "0" * 63}, "expected a sha256"),
        ({"kind": "c"}, 'kind is "c", expected one of "a", "b"'),
        ({"inner": 3}, "inner is 3, expected an object"),
        ({"inner": {}}, "inner.share is missing"),
        ({"inner": {"share": True}}, "inner.share is true, expected a number"),
        ({"inner": {"share": 1, "name": 2}}, "inner.name is 2, expected a text or null"),
        ({"many": {}}, "many is {}, expected a list"),
        ({"many": [{"share": 1}, {"share": "x"}]}, 'many[1].share is "x", expected a number'),
        ({"by_name": {"x": {"share": None}}}, "by_name.x.share is null, expected a number"),
        ({"either": "x"}, 'either is "x", expected an integer or a list or null'),
        ({"either": [1, "x"]}, 'either[1] is "x", expected an integer'),
        ({"odd": 4}, "odd is 4, expected an odd number"),
    ],
)
def test_wrong_fields_are_named(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**WHOLE, **change}))
    with pytest.raises(RecordError, match=re.escape(message)) as error:
        read_object(path, Record)
    text = str(error.value)
    assert text.startswith(f"{path} is damaged: ") and len(text.splitlines()) == 1
    assert "restore the file from a copy, or make it again" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"step": 1', "not JSON"),
        (b"[1]", "it is [1], expected an object"),
        (b'"x"', 'it is "x", expected an object'),
        (b"5", "expected an object"),
        (b"null", "expected an object"),
        (b'\xef\xbb\xbf{"step": 1}', "byte order mark: save it as UTF-8 without one"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"step": 9223372036854775808}', "9223372036854775808 is beyond 64 bits"),
        (b'{"step": -9223372036854775809}', "beyond 64 bits"),
        (b'{"step": ' + b"9" * 9000 + b"}", "beyond 64 bits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
    ids=range(13),
)
def test_files_that_are_no_objects(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=re.escape(message)) as error:
        read_object(path, Record)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 500


def test_missing_and_huge_files(tmp_path):
    with pytest.raises(RecordError, match=r"none\.json cannot be read: No such file"):
        read_object(tmp_path / "none.json")
    with pytest.raises(RecordError, match="cannot be read"):
        read_object(tmp_path)
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(RecordError, match="expected at most"):
        read_object(tmp_path / "huge.json")


def test_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    whole = b'{"step": 1}\n\n{"step": 2, "name": "\xe2\x80\xa8"}\n'
    # A kill cuts the last line short; a loss of power leaves zeros.
    for rest in (b"", b'{"step": 3', b"\0" * 50, b'{"st\n\0\0\n'):
        path.write_bytes(whole + rest)
        assert [line["step"] for line in read_lines(path, Record)] == [1, 2]
    for content, message in (
        (b'{"st\n' + whole, "line 1, is damaged: it is not JSON"),
        (whole + b"5\n", "line 4, is damaged: it is 5, expected an object"),
        (whole + b'{"step": null}', "line 4, is damaged: step is null"),
    ):
        path.write_bytes(content)
        with pytest.raises(RecordError, match=message):
            read_lines(path, Record)


def test_errors_of_code_that_reads_documents():
    with pytest.raises(RecordError, match=r"a\.json is damaged: 'rows' is missing"), interpreting("a.json"):
        print({}["rows"])
    with pytest.raises(RecordError, match=r"a\.json is damaged: 'int' object"), interpreting("a.json"):
        (5).imaginary("x")
    with pytest.raises(ZeroDivisionError), interpreting("a.json"):
        print(1 / 0)


def test_random_values_are_accepted_or_refused_in_one_line():
    def value(depth: int):
        kind = random.randrange(8 if depth else 6)
        if kind < 6:
            return random.choice([None, True, 0, -1, 3, 1.5, "x", "\n\u2028" * 9, "0" * 64])
        if kind == 6:
            return [value(depth - 1) for _ in range(random.randrange(3))]
        return {random.choice([*Record.__annotations__, "share", "name"]): value(depth - 1) for _ in range(3)}

    refused = 0
    for _ in range(2000):
        try:
            check_object(value(4), Record, "file")
        except RecordError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 400
    assert 1000 < refused < 2000


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    """One reader takes the first, another one the last."""
    (tmp_path / "a.json").write_text('{"inner": {"share": 0.1, "share": 0.9}}')
    with pytest.raises(RecordError, match=r"a.json is damaged: it is not JSON \(it has 'share' twice\)"):
        read_object(tmp_path / "a.json", Record)
