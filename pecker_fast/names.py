"""What a wrong name was probably meant to be."""

import difflib
from collections.abc import Iterable
from typing import Any


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
