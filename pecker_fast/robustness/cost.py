"""What it costs to bring a forgotten class back, and how that compares with relabelling and with never having seen it.

The cost of an attack is the number of steps until half of the images that are requested as a forgotten class are of one
again: the first step at which UA is 50 % or less, by linear interpolation between the measurements. An attack that does
not get there within the steps that were tried is censored: its cost is above them, by how much is unknown.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..metrics.intervals import Interval, interval, paired

# UA in percent from which half of the images are of the class again.
HALF = 50.0
# Relative difference from which one run counts as sooner or later, and up to which several count as equal.
MARGIN = 0.25

Relation = Literal["sooner", "same", "later", "unclear", "neither"]


@dataclass(frozen=True)
class Cost:
    """What an attack takes.

    Parameters
    ----------
    attack : str
        The attack and the sampler.
    steps : float
        Steps until half of the images are of the class; if ``censored``, those that were tried.
    images : float
        Images that the training has seen by then.
    censored : bool
        Whether the class did not come back that far.
    """

    attack: str
    steps: float
    images: float
    censored: bool

    def json(self) -> dict[str, Any]:
        """As it is written to robustness.json."""
        return {"attack": self.attack, "steps": self.steps, "images": self.images, "censored": self.censored}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Cost":
        """From ``json``."""
        return cls(record["attack"], record["steps"], record["images"], record["censored"])


def steps_to_half(steps: Sequence[float], uas: Sequence[float]) -> float | None:
    """Find the first step at which UA is 50 % or less.

    Parameters
    ----------
    steps : sequence of float
        Steps after which UA was measured, ascending.
    uas : sequence of float
        UA in percent after each of them.

    Returns
    -------
    float or None
        The first measured step if UA is that low there, otherwise interpolated linearly between the measurements
        around the first crossing; None if UA stays above 50 %.

    Raises
    ------
    ValueError
        If the lengths differ or are 0, or the steps do not ascend.
    """
    if len(steps) != len(uas) or not steps or list(steps) != sorted(set(steps)):
        raise ValueError(f"steps is {list(steps)}, expected ascending numbers, one for each of {len(uas)} uas")
    if uas[0] <= HALF:
        return float(steps[0])
    points = list(zip(steps, uas, strict=True))
    for (start, high), (end, low) in itertools.pairwise(points):
        if low <= HALF:
            return start + (end - start) * (high - HALF) / (high - low)
    return None


def costs_of(rows: Iterable[Mapping[str, Any]], network: str) -> list[Cost]:
    """The cost of each attack on the images of forgotten classes, in the order of ``rows``.

    Parameters
    ----------
    rows : iterable of mapping
        Rows of ``relearn`` with "network" and "data".
    network : str
        The network whose rows count.
    """
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if (row["network"], row["data"]) == (network, "forgotten"):
            curves.setdefault((row["attack"], row["sampler"]), []).append(row)
    costs = []
    for (attack, sampler), curve in curves.items():
        curve = sorted(curve, key=lambda row: row["step"])
        last = curve[-1]
        steps = steps_to_half([row["step"] for row in curve], [row["ua"] for row in curve])
        each = last["images"] / last["step"] if last["step"] else 0.0
        reached = last["step"] if steps is None else steps
        costs.append(Cost(f"{attack}, {sampler}", float(reached), reached * each, steps is None))
    return costs


def strongest(costs: Sequence[Cost]) -> Cost | None:
    """The attack that takes the fewest steps; None for no attack. All have been tried for the same number of steps."""
    return min(costs, key=lambda cost: (cost.censored, cost.steps), default=None)


@dataclass(frozen=True)
class Verdict:
    """How the cost of one network compares with that of another.

    Parameters
    ----------
    relation : {"sooner", "same", "later", "unclear", "neither"}
        When the class comes back. "unclear": the runs do not settle it; "neither": it came back in neither.
    text : str
        A sentence.
    ratio : float or None
        Mean steps over the other's; None if one is censored or the other's is 0.
    """

    relation: Relation
    text: str
    ratio: float | None

    def json(self) -> dict[str, Any]:
        """As it is written to robustness.json."""
        return {"relation": self.relation, "text": self.text, "ratio": self.ratio}


def mean_steps(costs: Iterable[Cost]) -> Interval | None:
    """Mean steps with a 95 % interval; a lower bound if some are censored, and then without an interval."""
    costs = list(costs)
    censored = sum(cost.censored for cost in costs)
    result = interval([cost.steps for cost in costs], censored)
    # Student's interval takes the values for exact.
    return Interval(result.mean, None, None, result.count, censored) if result and censored else result


def compare_costs(own: Mapping[Any, Cost], other: Mapping[Any, Cost], than: str, what: str = "class") -> Verdict | None:
    """Compare costs run by run.

    Parameters
    ----------
    own, other : mapping to Cost
        Of the network in question, and of the one that it is compared with, by run or by seed.
    than : str
        The other one in words, such as "after relabelling".
    what : str
        What is forgotten: "class" or "concept".

    Returns
    -------
    Verdict or None
        None if no run has both.
    """
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        return None
    pairs = [(own[seed], other[seed]) for seed in seeds]
    if any(cost.censored for pair in pairs for cost in pair):
        return _censored(pairs, than, what)
    first, second = ({seed: cost[seed].steps for seed in seeds} for cost in (own, other))
    means = [sum(values.values()) / len(seeds) for values in (first, second)]
    ratio = means[0] / means[1] if means[1] else None
    against = f"{means[0]:.1f} steps against {means[1]:.1f}"
    if len(seeds) == 1:
        relation = _apart(*means)
        return Verdict(relation, f"{_words(relation, than, what)}: {against}. One run: chance is not excluded.", ratio)
    difference = paired(first, second)
    low, high = difference.low, difference.high
    detail = f"{against}, a difference of {difference.mean:.1f} ({low:.1f} to {high:.1f}) over {len(seeds)} runs"
    relation: Relation = "later" if low > 0 else "sooner" if high < 0 else "unclear"
    if relation == "unclear" and max(-low, high) <= MARGIN * means[1]:
        relation = "same"
    # At least twice: the whole interval of own minus twice the other's is above 0.
    twice = paired(first, {seed: 2 * steps for seed, steps in second.items()})
    more = " That is at least twice the steps." if relation == "later" and twice.low >= 0 else ""
    return Verdict(relation, f"{_words(relation, than, what)}: {detail}.{more}", ratio)


def _apart(own: float, other: float) -> Relation:
    if abs(own - other) <= MARGIN * other:
        return "same"
    return "later" if own > other else "sooner"


def _words(relation: Relation, than: str, what: str) -> str:
    return {
        "sooner": f"The {what} comes back sooner than {than}",
        "same": f"The {what} comes back as soon as {than}",
        "later": f"The {what} comes back later than {than}",
        "unclear": f"The runs do not settle whether the {what} comes back sooner or later than {than}",
        "neither": f"The {what} came back neither here nor {than}",
    }[relation]


def _censored(pairs: Sequence[tuple[Cost, Cost]], than: str, what: str) -> Verdict:
    """If some cost is only a bound, what remains are the signs of the differences."""
    count, tried = len(pairs), max(cost.steps for pair in pairs for cost in pair if cost.censored)
    never, others_never = (sum(pair[i].censored for pair in pairs) for i in (0, 1))
    runs = "one run" if count == 1 else f"{count} runs"
    facts = (
        f"within {tried:g} steps half of the images were not of the {what} again in {never} of {runs} here, and in "
        f"{others_never} of {runs} {than}"
    )
    if all(a.censored and b.censored for a, b in pairs):
        return Verdict("neither", f"{_words('neither', than, what)}: {facts}. How they differ is unknown.", None)
    later = sum(not b.censored and (a.censored or a.steps > b.steps) for a, b in pairs)
    sooner = sum(not a.censored and (b.censored or a.steps < b.steps) for a, b in pairs)
    relation: Relation = "later" if later == count else "sooner" if sooner == count else "unclear"
    chance = " One run: chance is not excluded." if count == 1 else ""
    return Verdict(relation, f"{_words(relation, than, what)}: {facts}.{chance}", None)
