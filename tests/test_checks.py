"""Checks that are not covered by the tests of their callers."""

from dataclasses import dataclass
from typing import Literal

import pytest

from pecker_fast.checks import check_choice, check_int, check_literals


@dataclass(frozen=True)
class Base:
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: int = 3


@dataclass(frozen=True)
class Derived(Base):
    order: Literal[1, 2] = 1


def test_choices_are_named():
    check_choice("dtype", "float32", {"float32": 4, "bfloat16": 2})
    with pytest.raises(ValueError, match=r"^dtype is 'int8', expected one of float32, bfloat16$"):
        check_choice("dtype", "int8", {"float32": 4, "bfloat16": 2})


def test_literals_of_a_dataclass_and_its_bases():
    check_literals(Derived(order=2, steps=-1))
    with pytest.raises(ValueError, match=r"^sampler is 'euler', expected one of ddpm, ddim$"):
        check_literals(Derived(sampler="euler"))
    with pytest.raises(ValueError, match=r"^order is 3, expected one of 1, 2$"):
        check_literals(Derived(order=3))


def test_integers_fit_into_64_bits():
    """Otherwise a file of a run is written that its reader refuses."""
    check_int("seed", 2**63 - 1, 0)
    with pytest.raises(ValueError, match=r"^seed is 9223372036854775808, expected at most 9223372036854775807$"):
        check_int("seed", 2**63, 0)
    with pytest.raises(ValueError, match=r"^seed is 9223372036854775808, expected from 0 to 9$"):
        check_int("seed", 2**63, 0, 10)
