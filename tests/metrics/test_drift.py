"""How far weights have moved: against numpy, and networks that do not fit."""

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
        # Where it started from zero there is no scale.
        start[1].bias.zero_()
        moved[1].bias.fill_(0.5)
    found = weight_drift(moved, start)
    assert list(found) == [name for name, _ in moved.named_parameters()]
    assert found["0.weight"].changed == 18 and found["0.bias"] == Drift(3, 0, 0.0, found["0.bias"].start_squared)
    assert found["2.bias"].relative == pytest.approx(2.0) and found["1.bias"].relative is None
    layers = grouped(found, lambda name: name.split(".")[0])
    assert list(layers) == ["0", "1", "2"]

    def flat(net, names):
        params = dict(net.named_parameters())
        return np.concatenate([params[name].detach().double().numpy().ravel() for name in names])

    for key, names in (("0", ["0.weight", "0.bias"]), ("2", ["2.weight", "2.bias"])):
        a, b = flat(start, names), flat(moved, names)
        assert layers[key].relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
        assert (layers[key].entries, layers[key].changed) == (len(a), int((a != b).sum()))
    whole = total(found.values())
    a, b = flat(start, found), flat(moved, found)
    assert whole.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert whole.entries == len(a) and whole.changed == 18 + 2 + 3
    assert total([]).relative is None


def test_low_precision_is_not_lost():
    start = nn.Linear(64, 64).bfloat16()
    moved = nn.Linear(64, 64).bfloat16()
    found = total(weight_drift(moved, start).values())
    a, b = (torch.cat([p.detach().double().flatten() for p in net.parameters()]) for net in (start, moved))
    assert found.relative == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-12)


def test_the_share_that_is_trained():
    found = network()
    assert trained_percent(found) == 100 and trained_percent(nn.ReLU()) == 0
    found[0].requires_grad_(False)
    # 54 + 3 of these are frozen.
    assert trained_percent(found) == pytest.approx(100 * 14 / 71)


def test_other_networks():
    with pytest.raises(ValueError, match=r"no parameter 0\.weight of shape"):
        weight_drift(network(), nn.Sequential(nn.Conv2d(2, 4, 3)))
    with pytest.raises(ValueError, match=r"network has no parameter 2\.weight"):
        weight_drift(nn.Sequential(*list(network())[:2]), network())
