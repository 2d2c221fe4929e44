"""An environment with only torch, numpy and pytest: other installed packages cannot be imported.

Python imports this module by itself if its folder is on PYTHONPATH.
"""

import importlib.metadata
import os
import re
import sys

WANTED = ("torch", "numpy", "pytest")
# Set by the first process for those that it starts: reading what is installed takes half a second.
REFUSED = "PECKER_FAST_TEST_REFUSED_MODULES"


def _requirements(name: str, names: set[str]) -> set[str]:
    """A distribution and its requirements."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in names:
        return names
    try:
        required = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return names
    names.add(name)
    for line in required:
        if "extra ==" not in line:
            _requirements(re.match(r"[A-Za-z0-9._-]+", line)[0], names)
    return names


def _refused() -> set[str]:
    """Modules of the other installed packages."""
    allowed: set[str] = set()
    for name in WANTED:
        _requirements(name, allowed)
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", owner).lower() in allowed for owner in owners)
    } - {"pecker_fast", "tests"}


class _Filtered:
    """A finder that does not find some packages."""

    def __init__(self, finder, refused: set[str]) -> None:
        self._finder, self._refused = finder, refused

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self._refused else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


_refused_modules = set(os.environ[REFUSED].split()) if REFUSED in os.environ else _refused()
os.environ[REFUSED] = " ".join(_refused_modules)
sys.meta_path[:] = [_Filtered(finder, _refused_modules) for finder in sys.meta_path]
