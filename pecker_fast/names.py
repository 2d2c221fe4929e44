"""Names of options: what a wrong one was probably meant to be, and which ones the words of a command set."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

# Options that the words of the running command set; empty for calls from Python.
_SET: ContextVar[frozenset[str]] = ContextVar("set", default=frozenset())


def nearest(name: Any, names: Iterable[Any], prefix: str = "") -> str:
    """The end of a message about a wrong name.

    Parameters
    ----------
    name : object
        The wrong name.
    names : iterable
        The right ones.
    prefix : str
        What stands before a name in the message, such as "--".

    Returns
    -------
    str
        "; the nearest is ..." with the nearest of ``names``; empty if none is similar, or ``name`` is no string.
    """
    if not isinstance(name, str):
        return ""
    near = difflib.get_close_matches(name, [item for item in names if isinstance(item, str)], 1, 0.6)
    return f"; the nearest is {prefix + near[0]!r}" if near else ""


def option_names(words: Sequence[str]) -> set[str]:
    """The names of the options that words of the command line set."""
    return {
        word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
        for word in words
        if word.startswith("--")
    }


@contextlib.contextmanager
def running_with(words: Sequence[str]) -> Iterator[None]:
    """While a command with these words runs, ``is_set`` knows which options they set."""
    token = _SET.set(frozenset(option_names(words)))
    try:
        yield
    finally:
        _SET.reset(token)


def is_set(name: str) -> bool:
    """Whether the words of the running command set an option, be it to its default."""
    return name in _SET.get()
