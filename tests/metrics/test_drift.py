"""Drift of weights against numpy, and networks that do not match."""

import numpy as np
import pytest
import torch
from torch import nn

from pecker_fast.metrics.drift import Drift, grouped, total, trained_percent, weight_drift


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 1))


def test_against_numpy():
    start, moved = network(), network()
    moved.load_state_dict(start.state_dict())
    with torch.no_grad():
        moved[0].weight[1] += 0.01 * torch.randn(2, 3, 3)
        moved[2].bias.mul_(3)
        # A parameter that starts at zero has no relative drift.
        start[1].bias.zero_()
        moved[1].bias.fill_(0.5)
    drifts = weight_drift(moved, start)
    assert list(drifts) == [name for name, _ in moved.named_parameters()]
    assert drifts["0.weight"].changed == 18 and drifts["0.bias"] == Drift(3, 0, 0.0, drifts["0.bias"].start_squared)
    assert drifts["2.bias"].relative == pytest.approx(2.0) and drifts["1.bias"].relative is None
    layers = grouped(drifts, lambda name: name.split(".")[0])
    assert list(layers) == ["0", "1", "2"]

    def flat(net, names):
        params = dict(net.named_parameters())
        return np.concatenate([params[name].detach().double().numpy().ravel() for name in names])

    for key, names in (("0", ["0.weight", "0.bias"]), ("2", ["2.weight", "2.bias"])):
        a, b = flat(start, names), flat(moved, names)
        assert layers[key].relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
        assert (layers[key].entries, layers[key].changed) == (len(a), int((a != b).sum()))
    whole = total(drifts.values())
    a, b = flat(start, drifts), flat(moved, drifts)
    assert whole.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert whole.entries == len(a) and whole.changed == 18 + 2 + 3
    assert total([]).relative is None


def test_low_precision_weights_are_compared_in_float64():
    start = nn.Linear(64, 64).bfloat16()
    moved = nn.Linear(64, 64).bfloat16()
    drift = total(weight_drift(moved, start).values())
    a, b = (torch.cat([p.detach().double().flatten() for p in net.parameters()]) for net in (start, moved))
    assert drift.relative == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-12)


def test_percentage_of_trained_parameters():
    net = network()
    assert trained_percent(net) == 100 and trained_percent(nn.ReLU()) == 0
    net[0].requires_grad_(False)
    # 54 + 3 of 71 are frozen.
    assert trained_percent(net) == pytest.approx(100 * 14 / 71)


def test_networks_that_do_not_match():
    with pytest.raises(ValueError, match=r"no parameter 0\.weight of shape"):
        weight_drift(network(), nn.Sequential(nn.Conv2d(2, 4, 3)))
    with pytest.raises(ValueError, match=r"network has no parameter 2\.weight"):
        weight_drift(nn.Sequential(*list(network())[:2]), network())
