"""Methods by name. A file of this package that defines a ``Method`` with a name is a method; nothing lists them."""

import importlib
import inspect
import pkgutil
from functools import cache

from .protocol import Method


@cache
def _methods() -> dict[str, type[Method]]:
    package = __name__.rpartition(".")[0]
    paths = importlib.import_module(package).__path__
    found = {}
    for module in pkgutil.iter_modules(paths, package + "."):
        for _, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            # Modules first: to Python 3.10 Callable[[], int] is a class, which issubclass then does not take.
            if value.__module__ == module.name and issubclass(value, Method) and "name" in vars(value):
                if value.name in found:
                    raise RuntimeError(f"two methods are called {value.name!r}: {found[value.name]} and {value}")
                found[value.name] = value
    return dict(sorted(found.items()))


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    return list(_methods())


def method_class(name: str) -> type[Method]:
    """The method called ``name``. ValueError where there is none."""
    if name not in _methods():
        raise ValueError(f"method is {name!r}, expected one of {', '.join(_methods())}")
    return _methods()[name]
