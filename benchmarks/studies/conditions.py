"""The studies of the ablation, as data: their conditions, and what each is compared with."""

from dataclasses import dataclass, field
from typing import Any

# The reference: the same training on retained classes only.
NOTHING_FORGOTTEN = "no forgetting"


@dataclass(frozen=True)
class Condition:
    """A method with options, run once for each seed and pair of classes.

    Parameters
    ----------
    name : str
        In tables and in the names of its runs' folders. The same name means the same run in every study.
    method : str
    options : dict
        Options that differ from the method's defaults for the preset.
    factor : str
        The factor that it varies.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    factor: str = ""


@dataclass(frozen=True)
class Study:
    """Conditions, one of which is the default that the others are compared with.

    Parameters
    ----------
    asked : str
        The question.
    conditions : tuple of Condition
        Run on every pair, in the order of the tables.
    default : str
        Name of the condition that the others differ from.
    frontier : tuple of str
        Names of the conditions that make the frontier, with which all are compared.
    pairs : tuple of (int, int)
        Forgotten class and cover class.
    first_pair : tuple of Condition
        Further conditions, run on the first pair alone.
    """

    asked: str
    conditions: tuple[Condition, ...]
    default: str
    frontier: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    first_pair: tuple[Condition, ...] = ()

    def of_pair(self, pair: tuple[int, int]) -> tuple[Condition, ...]:
        """The conditions of a pair."""
        return (*self.conditions, *(self.first_pair if pair == self.pairs[0] else ()))


def _sfd(*weights: float) -> tuple[Condition, ...]:
    return tuple(Condition(f"sfd {w:g}", "sfd", _both(w), "SFD's coefficient") for w in weights)


def _pecker(name: str, factor: str, **options: Any) -> Condition:
    return Condition(name, "pecker", options, factor)


def _plus(name: str, factor: str, **options: Any) -> Condition:
    return Condition(name, "pecker+", options, factor)


def _both(weight: float) -> dict[str, float]:
    return {"score_forget_weight": weight, "generator_forget_weight": weight}


REFERENCE = Condition(NOTHING_FORGOTTEN, "sfd", _both(0.0), "reference")
# The two changes that PECKER+ makes to PECKER: see unlearning/pecker_plus.py.
DECOUPLED = {"generator_forget_weight": 0.1, "score_forget_weight": 0.02}
RETAIN_VARIANCE = {"variance": "retain", "max_update": 4.0}

MASK = Study(
    asked="What does the mask do? One factor at a time from PECKER's default, against SFD at several coefficients.",
    conditions=(
        _pecker("pecker", "default"),
        *_sfd(0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        *(_pecker(f"density {d:g}", "density", density=d) for d in (1.0, 0.2, 0.1, 0.05)),
        _pecker("random 0.5", "score", saliency_score="random"),
        _pecker("magnitude 0.5", "score", saliency_score="magnitude"),
        _pecker("random 0.1", "score", saliency_score="random", density=0.1),
        _pecker("magnitude 0.1", "score", saliency_score="magnitude", density=0.1),
        _pecker("refresh 1", "refresh", mask_refresh_steps=1),
        _pecker("refresh once", "refresh", mask_refresh_steps=0),
        *(_pecker(f"coefficient {w:g}", "coefficient", **_both(w)) for w in (0.01, 0.3, 1.0)),
        _pecker("alternate", "update", update="alternate"),
        _pecker("mask on all", "scope", mask_scope="all"),
        REFERENCE,
    ),
    default="pecker",
    frontier=tuple(f"sfd {w:g}" for w in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
    pairs=((0, 1),),
)
PLUS = Study(
    asked="Do PECKER+'s two changes pay, and does its mask? Against SFD at several coefficients.",
    conditions=(
        _plus("pecker+", "default"),
        _plus("pecker+ density 0.5", "density", density=0.5),
        *_sfd(0.05, 0.1, 0.2, 0.5),
        REFERENCE,
    ),
    first_pair=(
        _plus("pecker+ density 0.1", "density", density=0.1),
        _pecker("decoupled only", "part", **DECOUPLED),
        _pecker("decoupled only, density 1", "part", density=1.0, **DECOUPLED),
        _pecker("retain variance only", "part", **RETAIN_VARIANCE),
        _pecker("retain variance only, density 1", "part", density=1.0, **RETAIN_VARIANCE),
    ),
    default="pecker+",
    frontier=tuple(f"sfd {w:g}" for w in (0.02, 0.05, 0.1, 0.2, 0.5)),
    pairs=((0, 1), (3, 8), (7, 1)),
)
STUDIES = {"mask": MASK, "plus": PLUS}
