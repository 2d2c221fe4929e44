"""One option of the command line: its type, its values as words, and where dataclasses and functions keep them."""

import dataclasses
import functools
import os
import typing
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import docstring_parser

from .names import nearest

T = TypeVar("T")
# The default of an option that has to be set.
REQUIRED: Any = object()
_WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_KINDS = {int: ("an integer", "INT"), float: ("a number", "NUM"), str: ("text", "TEXT")}


class UsageError(ValueError):
    """Words of the command line that are no options of a command, or values that they cannot have.

    Attributes
    ----------
    command : str or None
        The command whose help says what is allowed.
    """

    command: str | None = None


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    Parameters
    ----------
    name : str
        As the field or the parameter is called.
    kind : type
        Its annotation.
    default : object
        Its default, or ``REQUIRED``.
    text : str
        What the help says.
    title : str
        Title of its group in the help.
    """

    name: str
    kind: Any
    default: Any
    text: str
    title: str

    @property
    def inner(self) -> Any:
        """Its type without None."""
        if get_origin(self.kind) in (Union, UnionType):
            (inner,) = (kind for kind in get_args(self.kind) if kind is not NoneType)
            return inner
        return self.kind

    @property
    def is_optional(self) -> bool:
        return self.inner is not self.kind

    @property
    def is_flag(self) -> bool:
        return self.inner is bool

    @property
    def is_list(self) -> bool:
        return get_origin(self.inner) is tuple

    @property
    def metavar(self) -> str | None:
        """What stands for its value in the help; None for a flag."""
        if self.is_flag:
            return None
        if not self.is_list:
            return _metavar(self.inner)
        kinds = [kind for kind in get_args(self.inner) if kind is not Ellipsis]
        return f"{_metavar(kinds[0])} ..." if len(kinds) == 1 else " ".join(map(_metavar, kinds))

    @property
    def usual(self) -> str:
        """The default as words of the command line; empty if there is none, or if the text says what it stands for."""
        nothing = self.default is REQUIRED or self.default is None or self.default is False
        if nothing or (self.default == () and "Default: " in self.text):
            return ""
        values = self.default if isinstance(self.default, tuple) else [self.default]
        return " ".join(map(text_of, values)) or "none"

    def convert(self, texts: Sequence[str], *, split: bool = True) -> Any:
        """The value that words stand for.

        Parameters
        ----------
        texts : sequence of str
            One word, or those of a list.
        split : bool
            Whether commas separate the items of a list, too.

        Raises
        ------
        UsageError
            If it is no value of this option.
        """
        if self.is_optional and [*texts] in (["None"], ["none"]) and "none" not in get_args(self.inner):
            return None
        if not self.is_list:
            (text,) = texts
            return self._convert(self.inner, text)
        kinds = get_args(self.inner)
        parts = [part for text in texts for part in (_parts(text) if split else [text])]
        if kinds[1:] == (Ellipsis,):
            return tuple(self._convert(kinds[0], part) for part in parts)
        if len(parts) != len(kinds):
            raise UsageError(f"{self.name} is {', '.join(parts) or 'empty'}, expected {len(kinds)} values")
        return tuple(self._convert(kind, part) for kind, part in zip(kinds, parts, strict=True))

    def _convert(self, kind: Any, text: str) -> Any:
        if get_origin(kind) is Literal:
            if text not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise UsageError(f"{self.name} is {text!r}, expected one of {choices}{nearest(text, get_args(kind))}")
            return text
        if kind is bool:
            if text.lower() not in _WORDS:
                raise UsageError(f"{self.name} is {text!r}, expected yes or no")
            return _WORDS[text.lower()]
        try:
            return kind(text)
        except ValueError as error:
            raise UsageError(f"{self.name} is {text!r}, expected {_KINDS[kind][0]}") from error


def options_of(group: Any, titles: Mapping[str, str], title: str = "options") -> list[Option]:
    """The options of a dataclass and of its groups, in order."""
    kind = type(group)
    hints, helps, own, inner = typing.get_type_hints(kind), _helps(kind), [], []
    for field in dataclasses.fields(kind):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            name = titles.get(field.name, field.name)
            inner += options_of(value, titles, name if name == title else f"{name} options")
        else:
            own.append(Option(field.name, hints[field.name], value, helps.get(field.name, ""), title))
    return [*own, *inner]


def with_values(group: T, values: Mapping[str, Any]) -> T:
    """A dataclass of options, some of them in groups, with ``values`` (option to value) in place of its own."""
    changes = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = with_values(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(group, **changes)


def _parts(text: str) -> list[str]:
    """The items of a list in one word; an assignment, or a path that exists, is one item whatever it has."""
    return [text] if "=" in text or os.path.exists(text) else [part for part in text.split(",") if part]


def text_of(value: Any, option: Option | None = None) -> str:
    """A value as a word of the command line."""
    if isinstance(value, bool):
        # YAML reads the word no as a truth value.
        choices = get_args(option.inner) if option is not None else ()
        return "yes" if value else "no" if option is None or option.is_flag or "no" in choices else "false"
    return str(value)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return "yes|no" if kind is bool else _KINDS[kind][1]


def _helps(kind: type) -> dict[str, str]:
    """Option to its help: the docstrings below the fields, or those of a function's parameters."""
    return kind._helps if hasattr(kind, "_helps") else _documented(kind)


@functools.cache
def _documented(kind: type) -> dict[str, str]:
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        helps |= parameters(docstring_parser.parse_from_object(base))
    return helps


def parameters(document: docstring_parser.Docstring) -> dict[str, str]:
    """What a docstring says of each parameter, by name."""
    return {
        param.arg_name: " ".join(param.description.split())
        for param in document.params
        if param.description is not None
    }
