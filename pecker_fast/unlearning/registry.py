"""Methods by name. A class of this package that derives from ``Method`` and has a name is a method; nothing lists
them."""

import importlib
import inspect
import pkgutil
from functools import cache

from ..names import nearest
from .protocol import Method


@cache
def _methods() -> dict[str, type[Method]]:
    package = __name__.rpartition(".")[0]
    paths = importlib.import_module(package).__path__
    methods: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(paths, package + "."):
        for _, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            # The module first: Python 3.10 takes Callable[[], int] for a class, which issubclass then rejects.
            if value.__module__ == module.name and issubclass(value, Method) and "name" in vars(value):
                if value.name in methods:
                    raise RuntimeError(f"two methods are called {value.name!r}: {methods[value.name]} and {value}")
                methods[value.name] = value
    return dict(sorted(methods.items()))


def method_names() -> list[str]:
    """Names of all methods that forget something, sorted."""
    return [name for name, kind in _methods().items() if kind.forgets]


def method_class(name: str) -> type[Method]:
    """The class of a method by its name. ValueError if there is no such method."""
    if name not in _methods():
        raise ValueError(
            f"method is {name!r}, expected one of {', '.join(method_names())}{nearest(name, method_names())}"
        )
    return _methods()[name]
