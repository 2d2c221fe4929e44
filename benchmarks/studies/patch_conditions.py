"""The study of patches, as data: its conditions, and the order in which runs are made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

NOTHING_FORGOTTEN = "no forgetting"
PATCH = "patch 0.1"
RELABEL, NEVER_SAW = "relabel", "never saw the class"
SEEDS = range(5)
# A preset, and the forgotten class and the cover class.
Place: TypeAlias = tuple[str, tuple[int, int]]
# Forgotten class and cover class, by preset, the most valuable first.
PLACES: tuple[Place, ...] = (("digits", (0, 1)), ("digits", (3, 8)), ("digits", (7, 1)), ("digits16", (0, 1)))


@dataclass(frozen=True)
class Condition:
    """A method with options, run once for each seed.

    Parameters
    ----------
    name : str
        In tables, and in the key of its runs.
    method : str
        Name of a method, or "lora".
    options : dict
        Options that differ from those of the preset.
    group : str
        What it is a setting of: "dense" conditions make the frontier.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Job:
    """A planned run."""

    preset: str
    pair: tuple[int, int]
    condition: Condition
    seed: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Identifies the record of the run."""
        return self.preset, f"{self.pair[0]}-{self.pair[1]}", self.condition.name, self.seed

    @property
    def title(self) -> str:
        preset, pair, name, seed = self.key
        return f"{preset} {pair.replace('-', ' onto ')}, {name}, seed {seed}"


def _dense(method: str, generator: float, score: float, rate: float, group: str = "dense") -> Condition:
    options = {"generator_forget_weight": generator, "score_forget_weight": score, "generator_learning_rate": rate}
    return Condition(f"{method} {generator:g}/{score:g} at {rate:g}", method, options, group)


def _patch(name: str, density: float, rate: float | None = None, group: str = "patch", **options: Any) -> Condition:
    """A patch; ``rate`` is the rate at its own density, by default from the preset's rule."""
    values: dict[str, Any] = {"density": density, **options}
    if rate is not None:
        # The option is the rate of density 1.
        values["generator_learning_rate"] = rate * density
    return Condition(name, "patch", values, group)


def _lora(rate: float) -> Condition:
    """Adapters of about as many bytes as a patch of a tenth of the digits' network."""
    options = {"generator_forget_weight": 0.3, "score_forget_weight": 0.02, "generator_learning_rate": rate}
    return Condition(f"lora at {rate:g}", "lora", options, "lora")


def _scores() -> Iterator[Condition]:
    for density in (0.1, 0.05, 0.02):
        for score in ("random", "gradient", "magnitude"):
            yield _patch(f"{score} {density:g}", density, saliency_score=score, group="score")


REFERENCE = Condition(
    NOTHING_FORGOTTEN, "sfd", {"generator_forget_weight": 0.0, "score_forget_weight": 0.0}, "reference"
)
COEFFICIENTS = ((0.05, 0.05), (0.1, 0.1), (0.1, 0.02), (0.3, 0.02))
RATES = (6e-4, 3e-4, 1.5e-4)
# Run on every pair and preset: the subject of the claims, with the dense settings that did best in trials.
CORE = (
    REFERENCE,
    _patch(PATCH, 0.1),
    _patch("patch 0.05", 0.05),
    _dense("pecker+", 0.3, 0.02, 1.5e-4),
    _dense("pecker+", 0.3, 0.02, 3e-4),
    _dense("sfd", 0.05, 0.05, 6e-4),
    _dense("sfd", 0.3, 0.02, 3e-4),
    _dense("sfd", 0.3, 0.02, 1.5e-4),
    _dense("pecker", 0.3, 0.02, 3e-4),
    _patch("patch 0.2", 0.2),
    _patch("patch 0.02", 0.02),
    *_scores(),
    _patch("conditioning 0.05", 0.05, act_on=("conditioning",), group="place"),
    _patch("conditioning 0.02", 0.02, act_on=("conditioning",), group="place"),
    _patch("body 0.05", 0.05, act_on=("body",), group="place"),
    # All of the layers that see the condition first, as ESD-x chooses them.
    _patch(
        "layers of ESD-x",
        1.0,
        act_on=("class_embedding.*", "*.time_emb_proj.*"),
        saliency_score="random",
        group="place",
    ),
    _lora(2.4e-3),
    _lora(5e-3),
)
# Run on the first pair: the same grid for the dense rules and the patch, and the other settings.
GRID = (
    *(
        _dense(method, *weights, rate)
        for weights in COEFFICIENTS
        for rate in RATES
        for method in ("sfd", "pecker", "pecker+")
    ),
    *(
        _patch(
            f"patch 0.1 {generator:g}/{score:g} at {rate:g}",
            0.1,
            rate,
            "patch grid",
            generator_forget_weight=generator,
            score_forget_weight=score,
        )
        for generator, score in COEFFICIENTS
        for rate in (4.8e-3, 2.4e-3, 1.2e-3)
    ),
)
# How the ratio is estimated. Run on the larger images too, where its estimate is noisier.
ESTIMATES = (
    _patch("patch 0.1, 256 chunks", 0.1, saliency_chunks=256),
    _patch("patch 0.05, 256 chunks", 0.05, saliency_chunks=256),
    _patch("patch 0.02, 256 chunks", 0.02, saliency_chunks=256),
    _patch("patch 0.1, damping 0.1", 0.1, saliency_damping=0.1),
)
FURTHER = (
    *(
        _patch(f"{score} {density:g} at {rate:g}", density, rate, "score", saliency_score=score)
        for density, rates in ((0.1, (1.2e-3, 4.8e-3)), (0.05, (2.4e-3, 9.6e-3)), (0.02, (6e-3, 2.4e-2)))
        for rate in rates
        for score in ("ratio", "random", "gradient")
    ),
    *(_patch(f"patch 0.1, psi {d:g}", 0.1, score_density=d, group="psi") for d in (0.5, 0.2, 0.1)),
    *(_patch(f"patch {d:g}", d) for d in (0.01, 0.005)),
    _patch("patch 0.02, damping 1", 0.02, saliency_damping=1.0),
    *ESTIMATES,
    _patch("random 0.01", 0.01, saliency_score="random", group="score"),
    _patch("patch 0.1, gradients not packed", 0.1, pack_gradients=False),
    _patch("conditioning 0.1", 0.1, act_on=("conditioning",), group="place"),
    _patch("conditioning 0.05 at random", 0.05, act_on=("conditioning",), saliency_score="random", group="place"),
    _patch("body 0.1", 0.1, act_on=("body",), group="place"),
    *(_lora(rate) for rate in (1.2e-3, 9.6e-3)),
)
# The conditions whose generators are attacked, beside the two controls.
RELEARN = (
    PATCH,
    "pecker+ 0.3/0.02 at 0.00015",
    "sfd 0.05/0.05 at 0.0006",
    "random 0.1",
    "conditioning 0.05",
)


def _distinct(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """The conditions without repeated names; the first one of a name is kept."""
    by_name: dict[str, Condition] = {}
    for condition in conditions:
        by_name.setdefault(condition.name, condition)
    return tuple(by_name.values())


CONDITIONS = _distinct((*CORE, *GRID, *FURTHER))


def plan(seeds: Sequence[int] = SEEDS, places: Sequence[Place] = PLACES) -> Iterator[Job]:
    """All runs, the most valuable first: the core and the grid on the first place, the core elsewhere, then the rest.

    All conditions of a seed come before the next seed, so that a partial study can already be compared.
    """
    first = [place for place in places if place == PLACES[0]]
    others = [place for place in places if place != PLACES[0]]
    core = _distinct(CORE)
    grid = [condition for condition in _distinct((*CORE, *GRID)) if condition not in core]
    rest = [condition for condition in CONDITIONS if condition not in core and condition not in grid]
    larger = [place for place in others if place[0] == "digits16"]
    for several, conditions in ((first, core), (first, grid), (others, core), (larger, ESTIMATES), (first, rest)):
        for preset, pair in several:
            for seed in seeds:
                for condition in conditions:
                    yield Job(preset, pair, condition, seed)


def relearning_plan(seeds: Sequence[int] = SEEDS, places: Sequence[Place] = PLACES) -> Iterator[Job]:
    """All attacks: on the generators of some conditions, on relabelling, and on one that never saw the class."""
    by_name = {condition.name: condition for condition in CONDITIONS}
    controls = [Condition(name, name, group="control") for name in (RELABEL, NEVER_SAW)]
    for preset, pair in places:
        for seed in seeds:
            for condition in (controls[0], *(by_name[name] for name in RELEARN), controls[1]):
                yield Job(preset, pair, condition, seed)
