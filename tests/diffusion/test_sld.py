"""SLD's step against scalar arithmetic in float64, and by hand."""

import numpy as np
import pytest
import torch

from pecker_fast.diffusion.sld import SAFETY_CONCEPT, SLD_CONFIGS, SLDConfig, sld_config, sld_guidance
from tests.diffusion.toy import assert_close, double


def exact(*shape):
    """Multiples of 2^-10: differences are exact in float32, and so is on which side of the threshold they are."""
    return torch.randint(-3000, 3000, shape).float() / 1024


def by_scalars(null, cond, safety, nu, step, c):
    guidance, momentum = np.empty_like(null), np.empty_like(null)
    for i in np.ndindex(null.shape):
        d = cond[i] - safety[i]
        mu = 0.0
        if d < c.threshold:
            mu = abs(d) * c.guidance_scale
            mu = 1.0 if mu > 1.0 else mu
        gamma = mu * (safety[i] - null[i]) + c.momentum_scale * nu[i]
        momentum[i] = c.momentum_beta * nu[i] + (1 - c.momentum_beta) * gamma
        guidance[i] = cond[i] - null[i] - (gamma if step >= c.warmup_steps else 0.0)
    return guidance, momentum


@pytest.mark.parametrize("name", SLD_CONFIGS)
def test_steps_follow_the_equations(name):
    config = SLD_CONFIGS[name]
    nu = torch.zeros(2, 4, 3, 3)
    expected_nu = double(nu)
    for step in range(config.warmup_steps + 3):
        null, cond, safety = exact(2, 4, 3, 3), exact(2, 4, 3, 3), exact(2, 4, 3, 3)
        # Some entries where the scale is not cut, and some right at the threshold.
        cond[0, 0] = safety[0, 0] - torch.tensor(1 / 1024)
        cond[1, 1] = safety[1, 1] + config.threshold if config.threshold in (0.0, 1.0) else safety[1, 1]
        given = [value.clone() for value in (null, cond, safety, nu)]
        guidance, after = sld_guidance(null, cond, safety, nu, step, config)
        for value, before in zip((null, cond, safety, nu), given, strict=True):
            assert torch.equal(value, before)
        expected, expected_nu = by_scalars(*map(double, (null, cond, safety)), expected_nu, step, config)
        assert_close(guidance, expected, scale=16)
        assert_close(after, expected_nu, scale=16)
        nu = after
    assert nu.abs().max() > 0


def test_by_hand():
    config = SLDConfig(1, 10.0, 0.5, 0.5, 0.25)
    null = torch.zeros(1, 4)
    cond = torch.tensor([[1.0, 0.25, -1.0, 0.5]])
    # d: 0.75 (above: off), 0.25 (cut at 1), -0.0625 (0.625), 0.5 (at the threshold: off).
    safety = torch.tensor([[0.25, 0.0, -0.9375, 0.0]])
    nu = torch.tensor([[2.0, 2.0, 2.0, 2.0]])
    gamma = torch.tensor([[1.0, 1.0, 0.625 * -0.9375 + 1.0, 1.0]])
    warm, after = sld_guidance(null, cond, safety, nu, 0, config)
    assert torch.equal(warm, cond) and torch.equal(after, 0.25 * nu + 0.75 * gamma)
    later, again = sld_guidance(null, cond, safety, nu, 1, config)
    assert torch.equal(later, cond - gamma) and torch.equal(again, after)


def test_configurations():
    assert [SLD_CONFIGS[name].warmup_steps for name in ("weak", "medium", "strong", "max")] == [15, 10, 7, 0]
    assert sld_config("strong") == SLDConfig(7, 2000, 0.025, 0.5, 0.7)
    assert "nudity" in SAFETY_CONCEPT.split(", ")
    with pytest.raises(ValueError, match="weak, medium, strong, max"):
        sld_config("hard")
    with pytest.raises(ValueError, match="momentum_beta is 1"):
        SLDConfig(0, 1.0, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match="threshold is nan"):
        SLDConfig(0, 1.0, float("nan"), 0.0, 0.0)
    with pytest.raises(ValueError, match="warmup_steps"):
        SLDConfig(-1, 1.0, 0.0, 0.0, 0.0)
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="momentum has shape"):
        sld_guidance(x, x, x, torch.zeros(1, 4, 2, 1), 0, SLD_CONFIGS["weak"])
    with pytest.raises(TypeError, match="eps_safety"):
        sld_guidance(x, x, x.int(), x, 0, SLD_CONFIGS["weak"])
    with pytest.raises(ValueError, match="step is -1"):
        sld_guidance(x, x, x, x, -1, SLD_CONFIGS["weak"])
