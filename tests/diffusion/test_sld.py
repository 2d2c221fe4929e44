"""SLD's step against scalar arithmetic in float64 and numbers worked out by hand."""

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule, sample_ddim
from pecker_fast.diffusion.sld import SAFETY_CONCEPT, SLD_CONFIGS, SLDConfig, sample_sld, sld_config, sld_guidance
from tests.diffusion.toy import AffineNetwork, assert_close, double


def exact(*shape):
    """Multiples of 2^-10, so that differences and comparisons with the threshold are exact in float32."""
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
        # Some entries have a scale below 1, and some lie exactly at the threshold.
        cond[0, 0] = safety[0, 0] - torch.tensor(1 / 1024)
        cond[1, 1] = safety[1, 1] + config.threshold if config.threshold in (0.0, 1.0) else safety[1, 1]
        copies = [value.clone() for value in (null, cond, safety, nu)]
        guidance, after = sld_guidance(null, cond, safety, nu, step, config)
        for value, before in zip((null, cond, safety, nu), copies, strict=True):
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
    # d and mu: 0.75 above the threshold, 0; 0.25, clamped to 1; -0.0625, 0.625; 0.5 at the threshold, 0.
    safety = torch.tensor([[0.25, 0.0, -0.9375, 0.0]])
    nu = torch.tensor([[2.0, 2.0, 2.0, 2.0]])
    gamma = torch.tensor([[1.0, 1.0, 0.625 * -0.9375 + 1.0, 1.0]])
    warm_up, momentum = sld_guidance(null, cond, safety, nu, 0, config)
    assert torch.equal(warm_up, cond) and torch.equal(momentum, 0.25 * nu + 0.75 * gamma)
    later, same_momentum = sld_guidance(null, cond, safety, nu, 1, config)
    assert torch.equal(later, cond - gamma) and torch.equal(same_momentum, momentum)


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


class LatentNetwork(AffineNetwork):
    """Draws latents and has a null label."""

    draws_latents, null_label, config = True, 0, {"in_channels": 4, "sample_size": 2}


def ddim_by_hand(network, schedule, z, steps, guidance_of):
    """Stable Diffusion's DDIM in float64; ``guidance_of(i, eps of each label)`` is added to eps_null."""
    alphas = schedule._exact.numpy()
    stride = len(alphas) // steps
    w, x = network.w.item(), double(z)
    for i, t in enumerate((np.arange(steps) * stride)[::-1] + 1):
        value = network.class_embedding.weight.detach().double().numpy()[:, 0]
        eps = {label: w * x + value[label] + network.s * t for label in range(len(value))}
        predicted = eps[0] + guidance_of(i, eps)
        after = alphas[t - stride] if t >= stride else alphas[0]
        x0 = (x - np.sqrt(1 - alphas[t]) * predicted) / np.sqrt(alphas[t])
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * predicted
    return x


def test_sampler_follows_the_equations():
    network, schedule = LatentNetwork(), NoiseSchedule.linear()
    with torch.no_grad():
        network.w.mul_(0.1)
    config = SLDConfig(2, 0.5, 10.0, 0.5, 0.7)
    labels, scale = torch.tensor([1, 3, 1]), 3.0
    samples = sample_sld(network, schedule, labels, 2, config, 10, scale, batch_size=2, seed=5)
    one_batch = sample_sld(network, schedule, labels, 2, config, 10, scale, batch_size=3, seed=5)
    assert_close(samples, double(one_batch))
    # If the guidance never begins, the samples are those of classifier-free guidance.
    late = SLDConfig(10, 0.5, 10.0, 0.5, 0.7)
    plain = sample_ddim(network, schedule, labels, 10, seed=5, guidance_scale=scale)
    assert_close(sample_sld(network, schedule, labels, 2, late, 10, scale, seed=5), double(plain))
    assert not torch.allclose(samples, plain)
    # Latents are not clamped.
    assert plain.abs().max() > 1
    generator = torch.Generator().manual_seed(5)
    torch.randint(2**32, (), generator=generator)
    z = torch.stack([torch.randn(4, 2, 2, generator=generator) for _ in labels])
    for row, label in enumerate(labels.tolist()):
        nu = np.zeros((4, 2, 2))

        def steered(i, eps, label=label):
            nonlocal nu
            guidance, nu = by_scalars(eps[0], eps[label], eps[2], nu, i, config)
            return scale * guidance

        expected = ddim_by_hand(network, schedule, z[row], 10, steered)
        assert_close(samples[row], expected, scale=np.abs(expected).max(), factor=512)
        expected = ddim_by_hand(
            network, schedule, z[row], 10, lambda _, eps, label=label: scale * (eps[label] - eps[0])
        )
        assert_close(plain[row], expected, scale=np.abs(expected).max(), factor=512)


def test_invalid_arguments(monkeypatch):
    network, schedule, config = LatentNetwork(), NoiseSchedule.linear(), SLD_CONFIGS["weak"]
    with pytest.raises(ValueError, match="safety_label is 4"):
        sample_sld(network, schedule, [1], 4, config)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        sample_sld(network, schedule, [1], 2, config, 0)
    with pytest.raises(ValueError, match="labels has 9"):
        sample_sld(network, schedule, [9], 2, config)
    monkeypatch.setattr("pecker_fast.diffusion.sld.null_label", lambda network: None)
    with pytest.raises(ValueError, match="no null label"):
        sample_sld(network, schedule, [1], 2, config)
