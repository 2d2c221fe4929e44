"""The one reader of JSON: objects with the fields that a record declares. Damaged files give one line.

A record is a ``TypedDict``. Fields that it does not declare are left alone, so that files of later versions are read.
"""

import json
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typing_extensions

# Far more than any file of a run or a model has; a larger one would fill the memory before it is refused.
MAX_BYTES = 64 << 20
RESTORE = "restore the file from a copy, or make it again"


class RecordError(ValueError):
    """A file that is missing or damaged; the message is one line with its name, the place in it, and the fix."""


@dataclass(frozen=True)
class Rule:
    """What values of a type are allowed, as metadata of ``Annotated``.

    Parameters
    ----------
    words : str
        What is allowed, for messages.
    allows : callable
        Takes a value of the type; true if it is allowed.
    """

    words: str
    allows: Callable[[Any], object]


SHA256 = Annotated[str, Rule("a sha256 (64 hexadecimal digits)", re.compile(r"[0-9a-f]{64}").fullmatch)]
COUNT = Annotated[int, Rule("an integer of at least 0", lambda value: value >= 0)]
POSITIVE = Annotated[int, Rule("an integer of at least 1", lambda value: value >= 1)]


def read_object(path: str | os.PathLike, record: Any = None, *, fix: str = RESTORE) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Parameters
    ----------
    path : path-like
        The file.
    record : type, optional
        A ``TypedDict``: the fields that the object must or may have, and their types.
    fix : str
        What to do about a damaged file, for the message.

    Returns
    -------
    dict
        The object.

    Raises
    ------
    RecordError
        If the file is missing or damaged, or a field is missing or has another type.
    """
    try:
        size = os.stat(path).st_size
        content = Path(path).read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    if size > MAX_BYTES:
        raise RecordError(f"{path} has {size} bytes, expected at most {MAX_BYTES}: {fix}")
    return parse_object(content, record, str(path), fix=fix)


def parse_object(content: bytes | str, record: Any, name: str, *, fix: str = RESTORE) -> dict[str, Any]:
    """``read_object`` of the content of a file or of a field in it; ``name``: its name in messages."""
    try:
        value = _parsed(content)
    except ValueError as error:
        raise RecordError(f"{name} is damaged: it is not JSON ({one_line(error)}); {fix}") from error
    check_object(value, record, name, fix=fix)
    return value


def check_object(value: Any, record: Any, name: str, *, fix: str = RESTORE) -> None:
    """Raise RecordError unless a JSON value is an object with the fields that ``record`` declares."""
    if not isinstance(value, dict):
        raise RecordError(f"{name} is damaged: it is {_shown(value)}, expected an object {{...}}; {fix}")
    fault = None if record is None else next(_faults(value, record, ""), None)
    if fault is not None:
        raise RecordError(f"{name} is damaged: {fault}; {fix}")


def read_lines(path: str | os.PathLike, record: Any = None, *, fix: str = RESTORE) -> list[dict[str, Any]]:
    """Read the objects of a JSON lines file; an empty list if there is no file.

    Lines at the end that are not JSON are left out: a kill or a loss of power cuts the last one short.

    Raises
    ------
    RecordError
        If another line is damaged, or a field is missing or has another type.
    """
    path = Path(path)
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    records: list[dict[str, Any]] = []
    cut: RecordError | None = None
    # Not splitlines(): other separators may occur in strings.
    for number, line in enumerate(content.split(b"\n"), 1):
        name = f"{path}, line {number},"
        try:
            value = _parsed(line) if line.strip() else None
        except ValueError as error:
            cut = cut or RecordError(f"{name} is damaged: it is not JSON ({one_line(error)}); {fix}")
            continue
        if not line.strip():
            continue
        if cut is not None:
            raise cut
        check_object(value, record, name, fix=fix)
        records.append(value)
    return records


@contextmanager
def interpreting(path: str | os.PathLike, *, fix: str = RESTORE) -> Iterator[None]:
    """Turns the errors of code that looks fields up in an object without checking them first into RecordError.

    For documents that this package writes and reads at one place each, such as reports' figures.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise RecordError(f"{path} is damaged: {reason}; {fix}") from error


def _parsed(content: bytes | str) -> Any:
    """The JSON value of a text. ValueError if it is not JSON."""
    try:
        return json.loads(_text(content), parse_int=_integer, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The object with these keys and values. ValueError if a key occurs twice: readers differ in which one counts."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return result


def _text(content: bytes | str) -> str:
    if isinstance(content, str):
        return content
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: byte {error.start}") from error


def _integer(digits: str) -> int:
    # Neither tensors nor other readers hold more.
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 63:
        raise ValueError(f"{digits[:24]} is beyond 64 bits")
    return int(digits)


def one_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; the name of its class if it has no message."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _shown(value: Any) -> str:
    """A JSON value for messages, cut short."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _faults(value: Any, kind: Any, place: str) -> Iterator[str]:
    """Where a JSON value is not of a type, in words."""
    if kind is Any or kind is object:
        return
    if typing_extensions.is_typeddict(kind):
        yield from _field_faults(value, kind, place)
        return
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        rule = arguments[1]
        if next(_faults(value, arguments[0], place), None) is not None or not rule.allows(value):
            yield f"{place} is {_shown(value)}, expected {rule.words}"
    elif origin in (Union, types.UnionType):
        if not any(next(_faults(value, option, place), None) is None for option in arguments):
            # The reason inside an object, if that is what it is.
            inner = next((option for option in arguments if isinstance(value, _containers(option))), None)
            yield from (
                [f"{place} is {_shown(value)}, expected {_name(kind)}"]
                if inner is None
                else _faults(value, inner, place)
            )
    elif origin is list and isinstance(value, list):
        for i, item in enumerate(value):
            yield from _faults(item, arguments[0], f"{place}[{i}]")
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from _faults(item, arguments[1], _inside(place, key))
    elif not _is(value, kind):
        yield f"{place} is {_shown(value)}, expected {_name(kind)}"


def _field_faults(value: Any, kind: Any, place: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place} is {_shown(value)}, expected an object"
        return
    hints = typing_extensions.get_type_hints(kind, include_extras=True)
    for name, hint in hints.items():
        if get_origin(hint) in (typing_extensions.NotRequired, typing_extensions.Required):
            (hint,) = get_args(hint)
        if name in value:
            yield from _faults(value[name], hint, _inside(place, name))
        elif name in kind.__required_keys__:
            yield f"{_inside(place, name)} is missing"


def _inside(place: str, key: str) -> str:
    key = key if len(key) <= 60 else f"{key[:57]}..."
    return f"{place}.{key}" if place else key


def _containers(kind: Any) -> tuple[type, ...]:
    """The classes of JSON containers that a type describes."""
    if typing_extensions.is_typeddict(kind) or get_origin(kind) is dict:
        return (dict,)
    return (list,) if get_origin(kind) is list else ()


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(kind))
    if kind is None or kind is types.NoneType:
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(kind, type) and isinstance(value, kind)


_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    types.NoneType: "null",
}


def _name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_name(option) for option in arguments))
    if origin is Literal:
        return f"one of {', '.join(map(_shown, arguments))}"
    if origin is Annotated:
        return arguments[1].words
    if typing_extensions.is_typeddict(kind):
        return "an object"
    return _NAMES.get(origin or kind, str(kind))
