"""NoiseSchedule against float64 arithmetic and diffusers' schedulers."""

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule

from .toy import EPS32, assert_close, double


def exact_linear(size=1000, start=1e-4, end=2e-2):
    return np.cumprod(1 - np.linspace(start, end, size))


def test_linear_is_exact_to_half_an_ulp():
    schedule = NoiseSchedule.linear()
    exact = exact_linear()
    t = torch.arange(1000)
    for actual, expected in (
        (schedule.alphas_cumprod, exact),
        (schedule.signal(t, 1), np.sqrt(exact)),
        (schedule.noise(t, 1), np.sqrt(1 - exact)),
    ):
        assert actual.dtype == torch.float32
        assert np.all(np.abs(double(actual) - expected) <= 0.51 * EPS32 * expected)


def test_signal_and_noise_broadcast():
    schedule = NoiseSchedule.linear(10)
    t = torch.tensor([3, 0, 9])
    assert schedule.signal(t).shape == (3, 1, 1, 1)
    assert schedule.noise(t, 2).shape == (3, 1)
    assert schedule.signal(4).shape == (1, 1, 1, 1)
    assert schedule.signal(torch.tensor(4), 3).shape == (1, 1, 1)
    assert torch.equal(schedule.noise(t, 1), torch.cat([schedule.noise(i, 1) for i in t.tolist()]))
    assert torch.equal(schedule.signal(t), schedule.signal(t.to(torch.uint8)))
    assert torch.all(schedule.signal(t) > 0) and schedule.signal(0) > schedule.signal(9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_add_noise_and_predictions(dtype):
    schedule = NoiseSchedule.linear()
    t = torch.randint(0, 1000, (5,))
    x0, eps = torch.randn(2, 5, 3, 4, 4).to(dtype)
    a, b = (double(v(t)) for v in (schedule.signal, schedule.noise))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_t = schedule.add_noise(x0, eps, t)
        x0_pred = schedule.predict_x0(x_t, eps, t)
        eps_pred = schedule.predict_eps(x_t, x0, t)
    assert_close(x_t, a * double(x0) + b * double(eps))
    x_t = double(x_t)
    assert_close(x0_pred, (x_t - b * double(eps)) / a, np.abs(x_t / a).max())
    assert_close(eps_pred, (x_t - a * double(x0)) / b, np.abs(x_t / b).max())


def test_prediction_gradients():
    schedule = NoiseSchedule.linear()
    t = torch.tensor([7, 900])
    x_t, eps = torch.randn(2, 2, 1, 2, 2).unbind(0)
    x_t.requires_grad_(), eps.requires_grad_()
    schedule.predict_x0(x_t, eps, t).sum().backward()
    a, b = (np.broadcast_to(double(v(t)), (2, 1, 2, 2)) for v in (schedule.signal, schedule.noise))
    assert_close(x_t.grad, 1 / a)
    assert_close(eps.grad, -b / a)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_from_diffusers(kind):
    from diffusers import DDIMScheduler, DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule=kind)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    # diffusers multiplies 1000 factors in float32: half an ulp each.
    assert_close(schedule.alphas_cumprod, double(scheduler.alphas_cumprod), 1.0, factor=500)
    x0, eps = torch.randn(2, 4, 3, 2, 2)
    t = torch.randint(50, 1000, (4,))
    assert_close(schedule.add_noise(x0, eps, t), double(scheduler.add_noise(x0, eps, t)), factor=1000)
    for scheduler_class in (DDPMScheduler, DDIMScheduler):
        converted = NoiseSchedule.from_scheduler(schedule.to_scheduler(scheduler_class))
        assert_close(converted.alphas_cumprod, double(schedule.alphas_cumprod), factor=1)


def test_linear_through_a_scheduler_is_bit_identical():
    from diffusers import DDPMScheduler

    for arguments in ((), (100,), (37, 3e-4, 0.1), (1,)):
        schedule = NoiseSchedule.linear(*arguments)
        scheduler = schedule.to_scheduler(DDPMScheduler, clip_sample=False)
        assert scheduler.config.beta_schedule == "linear" and scheduler.config.trained_betas is None
        assert not scheduler.config.clip_sample
        converted = NoiseSchedule.from_scheduler(scheduler)
        t = torch.arange(schedule.num_train_timesteps)
        assert torch.equal(converted.alphas_cumprod, schedule.alphas_cumprod)
        assert torch.equal(converted.noise(t), schedule.noise(t))
        assert torch.equal(converted.signal(t), schedule.signal(t))


def test_schedulers_of_other_networks_raise():
    from diffusers import DDPMScheduler

    with pytest.raises(ValueError, match="prediction_type is 'flow', expected one of epsilon, v_prediction, sample"):
        NoiseSchedule.from_scheduler(DDPMScheduler(prediction_type="flow"))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        NoiseSchedule.from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True))


def test_to_and_frozen():
    schedule = NoiseSchedule.linear(20)
    assert schedule.to("cpu") is schedule and schedule.device.type == "cpu"
    moved = schedule.to("meta")
    assert moved.device.type == "meta" and moved.alphas_cumprod.shape == (20,)
    back = moved.to("cpu")
    assert torch.equal(back.alphas_cumprod, schedule.alphas_cumprod)
    assert torch.equal(back.noise(0), schedule.noise(0))
    with pytest.raises(AttributeError):
        schedule.alphas_cumprod = torch.ones(3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.9, 0.0], r"leaves \(0, 1\)"),
        ([1.0, 0.5], r"leaves \(0, 1\)"),
        ([0.9, float("nan")], r"leaves \(0, 1\)"),
        ([0.5, 0.9], "increases"),
        ([], "shape"),
        ([[0.9]], "shape"),
    ],
)
def test_bad_alphas(values, message):
    with pytest.raises(ValueError, match=f"alphas_cumprod.*{message}"):
        NoiseSchedule(torch.tensor(values))


def test_bad_arguments():
    schedule = NoiseSchedule.linear(10)
    x = torch.randn(3, 1, 2, 2)
    with pytest.raises(TypeError, match="alphas_cumprod"):
        NoiseSchedule([0.9])
    with pytest.raises(ValueError, match="beta_end is 2"):
        NoiseSchedule.linear(10, 1e-4, 2)
    with pytest.raises(ValueError, match="num_train_timesteps is 0"):
        NoiseSchedule.linear(0)
    for t in (-1, 10, torch.tensor([0, 10, 1]), torch.tensor([0, -1, 1])):
        with pytest.raises(ValueError, match=r"t (is|has) (-1|10), expected .*from 0 to 9"):
            schedule.add_noise(x, x, t)
    for t in (1.0, True, torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(TypeError, match="t is"):
            schedule.add_noise(x, x, t)
    with pytest.raises(ValueError, match=r"t has shape \(2,\)"):
        schedule.predict_x0(x, x, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="eps has shape"):
        schedule.add_noise(x, x[:1], 3)
    with pytest.raises(ValueError, match="eps_pred has shape"):
        schedule.predict_x0(x, x[:, 0], 3)
    with pytest.raises(ValueError, match="x0 has shape"):
        schedule.predict_eps(x, x[:, 0], 3)
    with pytest.raises(TypeError, match=r"x0 is torch\.int64"):
        schedule.predict_eps(x, x.long(), 3)
    with pytest.raises(ValueError, match="x_t is on cpu, the schedule on meta"):
        schedule.to("meta").predict_x0(x, x, 3)
