"""Steps to half on constructed curves, censoring, intervals against scipy, and verdicts in words."""

import math

import pytest
from scipy import stats

from pecker_fast.metrics.intervals import interval
from pecker_fast.robustness import Cost, compare_costs, costs_of, mean_steps, steps_to_half, strongest
from pecker_fast.runs.robustness_figures import cost_record, summary

THAN = "after relabelling"


@pytest.mark.parametrize(
    ("uas", "expected"),
    [
        ((100, 75, 25), 15.0),
        ((100, 50, 0), 10.0),
        ((100, 100, 50), 20.0),
        ((100, 60, 20), 10 + 10 * 10 / 40),
        ((40, 90, 90), 0.0),
        # The first crossing counts, even if the class goes again.
        ((100, 30, 90), 10 * 50 / 70),
        ((100, 99, 50.1), None),
    ],
)
def test_steps_to_half_interpolates(uas, expected):
    result = steps_to_half((0, 10, 20), uas)
    assert result is None if expected is None else result == pytest.approx(expected)


def test_steps_have_to_ascend():
    for steps, uas in (((0, 10), (100,)), ((), ()), ((10, 0), (100, 0)), ((0, 0), (100, 0))):
        with pytest.raises(ValueError, match="expected ascending numbers"):
            steps_to_half(steps, uas)


def rows(network: str, attack: str, uas, data: str = "forgotten", batch: int = 16):
    return [
        {"network": network, "data": data, "attack": attack, "sampler": "one step", "step": step,
         "images": batch * step, "ua": ua, "retain_accuracy": 50.0, "forget_frechet": 1.0}
        for step, ua in zip((0, 10, 20), uas, strict=True)
    ]  # fmt: skip


def test_the_strongest_attack_and_its_images():
    of = [*rows("run", "regression", (100, 90, 40)), *rows("run", "matching", (100, 75, 25), batch=32)]
    of += [*rows("run", "denoising", (100, 99, 98)), *rows("run", "matching", (100, 0, 0), data="retained")]
    of += rows("relabel", "matching", (100, 0, 0))
    slow, best, never = costs_of(of, "run")
    assert slow == Cost("regression, one step", pytest.approx(18), pytest.approx(18 * 16), False)
    assert best == Cost("matching, one step", pytest.approx(15), pytest.approx(15 * 32), False)
    assert never == Cost("denoising, one step", 20.0, 320.0, True)
    assert strongest([slow, best, never]) == best and strongest([never]) == never and strongest([]) is None
    # An attack that got there only at the last step is stronger than one that did not.
    late = Cost("x", 20.0, 320.0, False)
    assert strongest([never, late]) == late
    record = cost_record(of)
    assert record["networks"]["relabel"]["steps"] == 5 and list(record["networks"]) == ["run", "relabel"]
    assert Cost.of(record["networks"]["run"]) == best
    figures = summary({"relearn": of, "cost": record})
    assert (figures["relearn_steps_to_half"], figures["relabel_steps_to_half"]) == (pytest.approx(15), 5)
    assert figures["cost_over_relabel"] == pytest.approx(3) and "control_steps_to_half" not in figures
    assert figures["relearn_images_to_half"] == pytest.approx(480)
    # A bound is no figure.
    censored = rows("run", "denoising", (100, 99, 98))
    assert "relearn_steps_to_half" not in summary({"relearn": censored, "cost": cost_record(censored)})


def costs(*steps, tried: float = 100.0) -> dict[int, Cost]:
    """By seed; None: not within the steps tried."""
    return {
        seed: Cost("a", tried if s is None else float(s), 16.0 * (tried if s is None else s), s is None)
        for seed, s in enumerate(steps)
    }


def test_intervals():
    mean = mean_steps(costs(10, 12, 14, 11, 13).values())
    half = stats.t.ppf(0.975, 4) * math.sqrt(2.5) / math.sqrt(5)
    assert (mean.mean, mean.censored) == (12, 0)
    assert (mean.low, mean.high) == (pytest.approx(12 - half), pytest.approx(12 + half))
    bound = mean_steps(costs(10, None, 14).values())
    assert (bound.mean, bound.low, bound.censored) == (pytest.approx(124 / 3), None, 1)
    assert mean_steps([]) is None and mean_steps(costs(7).values()).low is None
    assert interval([3.0]).text(str) == "3.0"


@pytest.mark.parametrize(
    ("own", "other", "relation", "words"),
    [
        # One run: by the margin of a quarter.
        ((12,), (10,), "same", "comes back as soon as after relabelling: 12.0 steps against 10.0"),
        ((13,), (10,), "later", "later than after relabelling"),
        ((7,), (10,), "sooner", "sooner than after relabelling"),
        ((0,), (0,), "same", "One run: chance is not excluded"),
        # Several: by the interval of the paired difference.
        ((22, 31, 28, 25, 30), (10, 12, 11, 10, 12), "later", "at least twice the steps"),
        ((15, 17, 16, 15, 17), (10, 12, 11, 10, 12), "later", "a difference of 5.0 (5.0 to 5.0) over 5 runs"),
        ((5, 6, 5, 6, 5), (10, 12, 11, 10, 12), "sooner", "sooner than"),
        ((10, 12, 11, 10, 12), (10, 12, 11, 10, 12), "same", "as soon as after relabelling"),
        ((2, 30, 9, 20, 5), (10, 12, 11, 10, 12), "unclear", "do not settle"),
        # Censored: by the signs alone.
        ((None,), (40,), "later", "in 1 of one run here, and in 0 of one run after relabelling. One run"),
        ((None, 80, None), (40, 50, 60), "later", "within 100 steps"),
        ((None, 80, 30), (40, 50, 60), "unclear", "do not settle"),
        ((10, 20), (None, None), "sooner", "sooner than"),
        ((None, None), (None, None), "neither", "neither here nor after relabelling"),
        ((None, 10), (None, 20), "unclear", "do not settle"),
    ],
)
def test_verdicts(own, other, relation, words):
    verdict = compare_costs(costs(*own), costs(*other), THAN)
    assert verdict.relation == relation and words in verdict.text, verdict
    assert ("twice" in verdict.text) == ("twice" in words)
    bounded = None in own + other or sum(other) == 0
    assert verdict.ratio == (None if bounded else pytest.approx(sum(own) / sum(other)))


def test_runs_are_paired_by_seed():
    own, other = costs(10, 20), {1: Cost("a", 20.0, 320.0, False), 7: Cost("a", 1.0, 16.0, False)}
    verdict = compare_costs(own, other, THAN)
    assert verdict.ratio == 1 and "One run" in verdict.text
    assert compare_costs(own, {9: other[7]}, THAN) is None


def test_steps_to_half_is_the_first_crossing():
    assert steps_to_half((0, 10, 20), (100, 80, 20)) == 15
    assert steps_to_half((0, 10), (40, 80)) == 0
    assert steps_to_half((0, 10), (100, 51)) is None
    assert steps_to_half((0, 10), (100, 50)) == 10
    assert steps_to_half((0, 10, 20, 30), (100, 50, 90, 10)) == 10
