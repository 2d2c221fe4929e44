"""Parametrisations against float64 arithmetic and against the schedulers and pipelines of diffusers."""

import json

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import (
    OneStepGenerator,
    Parametrisation,
    predict,
    prediction_loss,
    sample_ddim,
    sample_ddpm,
)
from pecker_fast.diffusion.sld import SLD_CONFIGS, sample_sld
from pecker_fast.models import read_schedule, schedule_from_config
from pecker_fast.models.schedules import READERS, config_of

from .parametrisations import CONFIGS, Oracle, schedule_of
from .toy import AffineNetwork

SHAPE = (6, 1, 2, 2)


def draw(kind: str):
    """x_0, eps and timesteps that include the first and the last."""
    schedule = schedule_of(kind)
    size = schedule.num_train_timesteps
    t = torch.cat([torch.tensor([0, size - 1]), torch.randint(size, (SHAPE[0] - 2,))])
    x0, eps = torch.randn(2, *SHAPE).unbind()
    return schedule, t, x0, eps


def close(actual, expected, scale=None, factor=16) -> bool:
    """Within ``factor`` roundings of float32 of ``scale``, the magnitude of the summed terms."""
    assert actual.dtype == torch.float32
    scale = expected.abs() if scale is None else scale
    return bool(((actual.double() - expected).abs() <= factor * 2**-24 * scale.clamp(min=1e-30)).all())


def call(network, oracle: Oracle, x_t, labels):
    """The network's output in float64."""
    w, v = network.parts(labels)
    times = oracle.times.view(-1, 1, 1, 1)
    return w * oracle.inputs(x_t) + torch.from_numpy(v) + network.s * times


@pytest.mark.parametrize("kind", CONFIGS)
def test_equations(kind):
    schedule, t, x0, eps = draw(kind)
    oracle, network, labels = Oracle(kind, t), AffineNetwork(), torch.arange(SHAPE[0]) % 4
    a, b = oracle.levels
    assert close(schedule.signal(t), a, factor=2) or (kind == "trigflow" and close(schedule.signal(t), a, 1 + a))
    assert close(schedule.noise(t), b, factor=2)
    x_t = schedule.add_noise(x0, eps, t)
    assert close(x_t, oracle.add_noise(x0.double(), eps.double()), (a * x0).abs() + (b * eps).abs())
    prediction = predict(network, schedule, x_t, t, labels)
    inputs, times = network.calls[0][:2]
    assert close(inputs, oracle.inputs(x_t.double())) and close(times.float(), oracle.times, 1e-3 + oracle.times.abs())
    # Behind the network: its output as it is rounded.
    output = network(inputs, times, labels)[0].double()
    expected = oracle.x0(x_t.double(), output)
    scale = (x_t.abs() + output.abs()).double() * torch.maximum(1 / a.clamp(min=1e-3), b)
    assert close(schedule.predict_x0(x_t, prediction, t), expected, scale, 64)
    implied_x0, implied_eps = schedule.split(x_t, prediction, t)
    assert close(implied_x0, expected, scale, 64)
    assert close(implied_eps, (x_t - a * expected) / b, (x_t.abs() + a * scale) / b, 64)
    loss = prediction_loss(schedule.target(x0, eps, t), prediction)
    assert loss.item() == pytest.approx(oracle.loss(x0.double(), eps.double(), output).mean().item(), rel=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_target_is_the_prediction_of_a_perfect_network(kind):
    schedule, t, x0, eps = draw(kind)
    x_t = schedule.add_noise(x0, eps, t)
    a, b = Oracle(kind, t).levels
    implied_x0, implied_eps = schedule.split(x_t, schedule.target(x0, eps, t), t)
    error = (1 + b) / a.clamp(min=1e-3) * 2**-18
    assert ((implied_x0 - x0).abs() <= error).all() and ((implied_eps - eps).abs() <= (1 + 1 / b) * 2**-18).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_step_samples_and_their_gradient(kind):
    schedule, network = schedule_of(kind), AffineNetwork()
    t_init = schedule.num_train_timesteps - 1 if schedule.one_step_at is not None else 20
    oracle = Oracle(kind, torch.tensor([t_init] * 3))
    z, labels = torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 2])
    x = OneStepGenerator(schedule, t_init)(network, z, labels)
    x.sum().backward()
    x_init = (oracle.levels[1] * z).detach()
    expected = oracle.one_step(x_init, call(network, oracle, x_init, labels))
    assert torch.allclose(x.double(), expected, rtol=1e-4, atol=1e-4)
    # The sample is affine in the network's output: its slope from two outputs.
    ones = torch.ones_like(x_init)
    slope = oracle.one_step(x_init, ones) - oracle.one_step(x_init, 0 * ones)
    assert network.w.grad.item() == pytest.approx((slope * oracle.inputs(x_init)).sum().item(), rel=1e-4, abs=1e-4)


def test_consistency_models_draw_from_the_last_level_only():
    with pytest.raises(ValueError, match="t_init is 20, expected 39: CMStochasticIterativeScheduler draws in one step"):
        OneStepGenerator(schedule_of("consistency"), 20)


def test_boundary_and_scalings_are_those_of_diffusers():
    from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler

    schedule, scheduler = schedule_of("consistency"), CMStochasticIterativeScheduler()
    sigmas = schedule.noise(torch.arange(40), 1)
    assert torch.allclose(sigmas.flip(0).double(), scheduler.sigmas, rtol=1e-6)
    assert torch.allclose(schedule.network_time(torch.arange(40)).double().flip(0), scheduler.timesteps, rtol=1e-6)
    x, y, t = *torch.randn(2, 40, 1, 2, 2), torch.arange(40)
    s = sigmas.view(-1, 1, 1, 1)
    skip, out = scheduler.get_scalings_for_boundary_condition(s)
    assert torch.allclose(schedule.generate(x, y, t), skip * x + out * y, atol=1e-5)
    assert torch.equal(schedule.generate(x, y, t)[0], x[0])
    skip, out = scheduler.get_scalings(s)
    assert torch.allclose(schedule.predict_x0(x, y, t), skip * x + out * y, atol=1e-5)
    for kind in ("edm", "edm_v"):
        schedule, scheduler = schedule_of(kind), EDMEulerScheduler.from_config(CONFIGS[kind])
        sigmas = schedule.noise(torch.arange(40)).view(-1, 1, 1, 1)
        assert torch.allclose(schedule.predict_x0(x, y, t), scheduler.precondition_outputs(x, y, sigmas), atol=1e-5)
        assert torch.allclose(schedule.network_input(x, t), scheduler.precondition_inputs(x, sigmas), rtol=1e-5)
        assert torch.allclose(schedule.network_time(t), scheduler.precondition_noise(sigmas).flatten(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_deterministic_samples_are_those_of_eulers_method_in_diffusers(kind):
    import diffusers

    schedule, network, labels = schedule_of(kind), AffineNetwork(), torch.tensor([0, 1])
    network.config = {"in_channels": 1, "sample_size": 2}
    with torch.no_grad():
        network.w.copy_(torch.tensor(0.3))
    ours = sample_ddim(network, schedule, labels, 5, seed=7, clip_sample=False, shape=(1, 2, 2))
    times = [49, 39, 29, 19, 9]
    sigmas = schedule.noise(torch.tensor(times), 1).double()
    scheduler = getattr(diffusers, CONFIGS[kind]["_class_name"]).from_config(CONFIGS[kind])
    if kind == "flow":
        # Its levels are shifted once more.
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=50)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
    else:
        scheduler.sigmas = torch.cat([sigmas.float(), torch.zeros(1)])
        scheduler.timesteps, scheduler.num_inference_steps = scheduler.precondition_noise(sigmas.float()), 5
    from pecker_fast.diffusion.sampling import _Noise

    x = _Noise(7, (1, 2, 2)).start(2) * sigmas[0].float()
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t) if kind == "edm" else x
        with torch.no_grad():
            output = network(inputs, t.expand(2), labels)[0]
        x = scheduler.step(output, t, x).prev_sample
    assert torch.allclose(ours, x.clamp(-1, 1), atol=2e-5) and (ours.abs() < 1).any()


@pytest.mark.parametrize("kind", [k for k in CONFIGS if k not in ("epsilon", "v_prediction", "sample")])
def test_ancestral_steps_keep_the_marginal(kind):
    """Given the true x_0, x_s has the mean a_s x_0 and the standard deviation b_s."""
    schedule = schedule_of(kind)
    last = schedule.num_train_timesteps - 1
    x0, eps, z = torch.full((40_000, 1), 0.7), *torch.randn(2, 40_000, 1)
    for t, s in ((last, last - 5), (last - 10, 5)):
        x_t = schedule.add_noise(x0, eps, t)
        x_s = schedule.step(x_t, schedule.target(x0, eps, t), t, s, z)
        (a,), (b,) = (v.flatten().tolist() for v in Oracle(kind, torch.tensor([s])).levels)
        assert x_s.mean().item() == pytest.approx(0.7 * a, abs=0.03 * b)
        assert x_s.std().item() == pytest.approx(b, rel=0.02)
        # And it depends on x_t: the correlation of its noise with eps is (a_t / a_s) (b_s / b_t).
        a_t, b_t = (v.item() for v in Oracle(kind, torch.tensor([t])).levels)
        correlation = np.corrcoef(x_s[:, 0].numpy(), eps[:, 0].numpy())[0, 1]
        assert correlation == pytest.approx(a_t / a * b / b_t, abs=0.03)


def test_ancestral_samples_are_those_of_ddpm_on_its_schedule():
    """The general step, with the levels of a variance-preserving schedule, draws as diffusers' DDPM does."""
    from diffusers import DDPMScheduler

    vp, network, labels = schedule_of("epsilon"), AffineNetwork(), torch.tensor([0, 1, 3])
    a, b = vp._float64["signal"], vp._float64["noise"]
    general = Parametrisation(a, b, skip=1 / a, out=-b / a, scheduler={"_class_name": "-"}, predicts="noise")
    with torch.no_grad():
        network.w.copy_(torch.tensor(0.4))
    images = [sample_ddpm(network, s, labels, 50, seed=3, shape=(1, 2, 2), clip_sample=True) for s in (vp, general)]
    assert DDPMScheduler.__name__ == config_of(vp.to_scheduler())["_class_name"]
    assert torch.allclose(images[0], images[1], atol=2e-4) and (images[0].abs() < 1).any()


@pytest.mark.parametrize("kind", CONFIGS)
def test_schedulers_are_saved_and_read_again(kind, tmp_path):
    schedule = schedule_of(kind)
    schedule.to_scheduler().save_pretrained(tmp_path)
    again = read_schedule(tmp_path)
    assert again.predicts == schedule.predicts and again.one_step_at == schedule.one_step_at
    assert again._float64.keys() == schedule._float64.keys()
    for name, table in schedule._float64.items():
        assert torch.allclose(again._float64[name], table, rtol=1e-9, atol=0, equal_nan=True), name
    moved = schedule.to("meta")
    assert moved.device.type == "meta" and torch.equal(moved.to("cpu").noise(3), schedule.noise(3))


REFUSED = [
    (
        {"_class_name": "VQDiffusionScheduler"},
        "_class_name 'VQDiffusionScheduler', expected one of DDPMScheduler, DDIM",
    ),
    ({"num_train_timesteps": 1000}, "has no _class_name"),
    ({"_class_name": ["DDPMScheduler"]}, r"_class_name \['DDPMScheduler'\], expected one of"),
    ("x", "is damaged: .*expected an object"),
    ([1], "is damaged: .*expected an object"),
    (
        {"_class_name": "DDPMScheduler", "prediction_type": "velocity"},
        "prediction_type is 'velocity', expected 'epsilon'",
    ),
    (
        {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True},
        "rescale_betas_zero_snr is True, expected False",
    ),
    ({"_class_name": "DDPMScheduler", "beta_schedule": "cosine"}, "beta_schedule is 'cosine', expected one of"),
    ({"_class_name": "DDPMScheduler", "beta_end": "x"}, "beta_end is 'x', expected a number"),
    ({"_class_name": "DDPMScheduler", "num_train_timesteps": 1.5}, "num_train_timesteps is 1.5, expected an integer"),
    (
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
        "prediction_type is 'flow_prediction', expected 'epsilon' or",
    ),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        "prediction_type is 'epsilon', expected 'flow_prediction'",
    ),
    (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
        "use_dynamic_shifting is True, expected False",
    ),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1}, "shift is -1, expected a number above 0"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal is 0.1, expected None"),
    (
        {"_class_name": "SCMScheduler", "prediction_type": "epsilon"},
        "prediction_type is 'epsilon', expected 'trigflow'",
    ),
    ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"}, "sigma_schedule is 'exponential'"),
    ({"_class_name": "EDMEulerScheduler", "sigma_data": 0}, "sigma_data is 0, expected a number above 0"),
    ({"_class_name": "CMStochasticIterativeScheduler", "sigma_max": 0.001}, "sigma_max above sigma_min"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_understood_is_refused_in_one_line(config, message, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        read_schedule(tmp_path)
    assert str(tmp_path / "scheduler_config.json") in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_json_are_refused(tmp_path):
    for content in (b"", b'{"_class', b"\xff\xfe", b"\xef\xbb\xbf{}"):
        (tmp_path / "scheduler_config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"scheduler_config\.json is damaged") as error:
            read_schedule(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", READERS)
def test_missing_keys_have_the_defaults_of_the_class(kind):
    import diffusers

    if kind == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, kind)()
    one, two = schedule_from_config({"_class_name": kind}), schedule_from_config(config_of(scheduler))
    assert all(torch.equal(one._float64[name], two._float64[name]) for name in one._float64)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is not None:
        assert torch.allclose(one.alphas_cumprod, alphas, rtol=1e-4)
    assert one.num_train_timesteps == scheduler.config.num_train_timesteps


def test_sld_needs_the_noise():
    network = AffineNetwork()
    network.null_label, network.config = 0, {"in_channels": 1, "sample_size": 2}
    with pytest.raises(ValueError, match="sampler is 'sld', but the network predicts a flow velocity"):
        sample_sld(network, schedule_of("flow"), [1], 2, SLD_CONFIGS["weak"], 2)
