"""What it costs to bring a concept back: fine-tuning and inversion are not mixed."""

import pytest

from pecker_fast.figures import find
from pecker_fast.runs.robustness_figures import costs_of_prompts


def curve(network: str, attack: str, uas: dict[int, float]) -> list[dict]:
    same = {"network": network, "data": "forgotten", "attack": attack, "sampler": "one step at 625"}
    return [{**same, "step": step, "images": 4 * step, "ua": ua} for step, ua in uas.items()]


def test_costs_of_prompts():
    rows = [
        # Fine-tuning does not bring it back in 100 steps; inversion does in some hundred.
        *curve("run", "matching", {0: 100, 10: 100, 100: 60}),
        *curve("run", "regression", {0: 100, 10: 90, 100: 80}),
        *curve("run", "inversion", {0: 100, 200: 60, 400: 20}),
        *curve("relabel", "matching", {0: 100, 10: 0, 100: 0}),
        *curve("relabel", "inversion", {0: 100, 200: 0, 400: 0}),
    ]
    costs, figures = costs_of_prompts(rows)
    assert list(costs) == ["cost", "inversion_cost"]
    assert costs["cost"]["networks"]["run"]["censored"] and costs["cost"]["verdicts"]["relabel"]["relation"] == "later"
    assert costs["inversion_cost"]["networks"]["run"]["steps"] == pytest.approx(250)
    assert costs["inversion_cost"]["verdicts"]["relabel"]["ratio"] == pytest.approx(2.5)
    assert all("The concept" in cost["verdicts"]["relabel"]["text"] for cost in costs.values())
    assert figures == pytest.approx(
        {
            "relabel_steps_to_half": 5.0,
            "relearn_forget_ua_10": 90.0,
            "relearn_forget_ua_100": 60.0,
            "inversion_steps_to_half": 250.0,
            "inversion_relabel_steps_to_half": 100.0,
            "inversion_cost_over_relabel": 2.5,
            "inversion_ua_200": 60.0,
            "inversion_ua_400": 20.0,
        }
    )
    assert all(find(name) is not None for name in figures)


def test_an_attack_that_was_not_tried_has_no_cost():
    costs, figures = costs_of_prompts(curve("run", "inversion", {0: 100, 5: 0}))
    assert list(costs) == ["inversion_cost"] and costs["inversion_cost"]["verdicts"] == {}
    assert figures == {"inversion_steps_to_half": 2.5, "inversion_ua_5": 0.0}
