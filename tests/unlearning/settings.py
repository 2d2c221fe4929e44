"""Settings for tests, from the fields of their parts."""

from dataclasses import fields
from typing import Any

from pecker_fast.unlearning import Compute, Placement, Problem, Setting


def setting_of(**values: Any) -> Setting:
    """A setting from the fields of its parts, by name."""
    parts = []
    for kind in (Problem, Compute, Placement):
        names = [item.name for item in fields(kind) if item.name in values]
        parts.append(kind(**{name: values.pop(name) for name in names}))
    assert not values, f"no part of a setting has {sorted(values)}"
    return Setting(*parts)
