"""Samplers: determinism, independence of the batch size, agreement with diffusers' own loops."""

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule, OneStepGenerator, sample_ddim, sample_ddpm, sample_one_step
from pecker_fast.diffusion.sampling import _Noise

from .toy import tiny_unet

SCHEDULE = NoiseSchedule.linear(100, 1e-3, 0.1)
LABELS = [0, 1, 2, 0, 1]
# Rounding of a float32 network over a few steps: matrix products of other batches may sum in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(3)
    return tiny_unet(null_label=True)


def one_step(unet, labels, **options):
    return sample_one_step(unet, OneStepGenerator(SCHEDULE, 44), labels, **options)


def ddim(unet, labels, **options):
    return sample_ddim(unet, SCHEDULE, labels, 4, **options)


def ddpm(unet, labels, **options):
    return sample_ddpm(unet, SCHEDULE, labels, 4, **options)


SAMPLERS = pytest.mark.parametrize("sampler", [one_step, ddim, ddpm])


@SAMPLERS
def test_deterministic_and_independent_of_the_batch_size(unet, sampler):
    samples = sampler(unet, LABELS)
    assert samples.shape == (5, 1, 8, 8) and samples.dtype == torch.float32
    assert samples.abs().max() <= 1 and not samples.requires_grad
    torch.manual_seed(0)
    assert torch.equal(sampler(unet, torch.tensor(LABELS), seed=0), samples)
    assert torch.equal(sampler(unet, LABELS, seed=torch.Generator().manual_seed(0)), samples)
    states = set()
    for batch_size in (1, 2, 64):
        generator = torch.Generator().manual_seed(0)
        sampler(unet, LABELS, batch_size=batch_size, seed=generator)
        states.add(bytes(generator.get_state().tolist()))
    assert len(states) == 1
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(sampler(unet, LABELS, batch_size=batch_size), samples, **TOLERANCE)
    # The number of samples does not matter.
    torch.testing.assert_close(sampler(unet, LABELS[:2]), samples[:2], **TOLERANCE)
    other = sampler(unet, LABELS, seed=1)
    assert (other - samples).abs().max() > 0.01
    assert (samples[0] - samples[3]).abs().max() > 0.01
    assert (sampler(unet, [1, *LABELS[1:]])[0] - samples[0]).abs().max() > TOLERANCE["atol"]


@SAMPLERS
def test_seed_per_sample_gives_the_noise_of_a_sample_drawn_alone(unet, sampler):
    seeds = [5, 3, 5, 2**40, 0]
    samples = sampler(unet, LABELS, seed=seeds, batch_size=2)
    for row, (label, seed) in enumerate(zip(LABELS, seeds, strict=True)):
        torch.testing.assert_close(samples[row], sampler(unet, [label], seed=seed)[0], **TOLERANCE)
    with pytest.raises(ValueError, match="seed has 4 seeds, expected 5"):
        sampler(unet, LABELS, seed=seeds[:4])
    with pytest.raises(ValueError, match="seed is -1"):
        sampler(unet, LABELS, seed=[-1, *seeds[1:]])


@SAMPLERS
def test_global_generator_and_mode_are_unchanged(unet, sampler):
    unet.train()
    state = torch.get_rng_state()
    for module in unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    sampler(unet, [0])
    assert unet.training
    assert torch.equal(torch.get_rng_state(), state)
    unet.eval()


def test_noise_is_standard_normal_and_shared():
    first, second = _Noise(5, (1, 16, 16)), _Noise(5, (1, 16, 16))
    z = first.start(64)
    assert torch.equal(torch.cat([second.start(63), second.start(1)]), z)
    # 16384 draws: standard errors 0.008 and 0.0055; six of them.
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.035
    assert len({float(sample[0, 0, 0]) for sample in z}) == 64
    values = [torch.randn((), generator=g).item() for g in first.generators(3) + first.generators(2)]
    assert len(set(values)) == 5


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 5), (3, 8, 8)])
def test_noise_does_not_depend_on_the_number_of_samples(shape):
    whole, parts = _Noise(5, shape), _Noise(5, shape)
    assert torch.equal(whole.start(6), torch.cat([parts.start(count) for count in (1, 3, 2)]))
    # The generator ends in the same state.
    assert torch.equal(whole.generator.get_state(), parts.generator.get_state())


def test_one_step_clamps_the_output_of_the_generator(unet):
    z = _Noise(0, (1, 8, 8)).start(5)
    with torch.no_grad():
        expected = OneStepGenerator(SCHEDULE, 44)(unet, z, torch.tensor(LABELS))
    assert expected.abs().max() > 1
    assert torch.equal(one_step(unet, LABELS), expected.clamp(-1, 1))


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_ddim_against_diffusers(unet, clip_sample, guidance_scale):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(100, 1e-3, 0.1, "linear", clip_sample=clip_sample)
    scheduler.set_timesteps(4)
    labels, null = torch.tensor(LABELS), torch.full((5,), 3)
    x = _Noise(0, (1, 8, 8)).start(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = unet(x, t, class_labels=labels).sample
            if guidance_scale != 1:
                eps_null = unet(x, t, class_labels=null).sample
                eps = eps_null + guidance_scale * (eps - eps_null)
            x = scheduler.step(eps, t, x).prev_sample
    samples = ddim(unet, LABELS, clip_sample=clip_sample, guidance_scale=guidance_scale)
    torch.testing.assert_close(samples, x.clamp(-1, 1), **TOLERANCE)


def test_ddpm_against_diffusers(unet):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(100, 1e-3, 0.1, "linear", variance_type="fixed_small", clip_sample=True)
    scheduler.set_timesteps(4)
    noise = _Noise(0, (1, 8, 8))
    x, generators = noise.start(5), noise.generators(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = unet(x, t, class_labels=torch.tensor(LABELS)).sample
            x = scheduler.step(eps, t, x, generator=generators).prev_sample
    torch.testing.assert_close(ddpm(unet, LABELS), x.clamp(-1, 1), **TOLERANCE)


def test_all_steps_by_default(unet):
    short = NoiseSchedule.linear(3, 0.1, 0.5)
    assert torch.equal(sample_ddpm(unet, short, [0]), sample_ddpm(unet, short, [0], 3))
    assert not torch.equal(sample_ddpm(unet, short, [0]), sample_ddpm(unet, short, [0], 2))


def test_shape_is_taken_from_the_argument(unet):
    assert one_step(unet, [0, 1], shape=(1, 4, 8)).shape == (2, 1, 4, 8)


@SAMPLERS
def test_bad_arguments(unet, sampler):
    for labels, error, message in (
        ([0, 4], ValueError, "labels has 4, expected values from 0 to 3"),
        ([-1], ValueError, "labels has -1"),
        ([], ValueError, r"labels has shape \(0,\)"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"labels has shape \(2, 1\)"),
        ([0.5], TypeError, "labels has 0.5"),
        (torch.zeros(2), TypeError, "labels is torch.float32"),
    ):
        with pytest.raises(error, match=message):
            sampler(unet, labels)
    with pytest.raises(ValueError, match="batch_size is 0"):
        sampler(unet, [0], batch_size=0)
    with pytest.raises(ValueError, match="seed is -1"):
        sampler(unet, [0], seed=-1)
    with pytest.raises(ValueError, match="shape is"):
        sampler(unet, [0], shape=(8, 8))


def test_bad_steps(unet):
    for steps in (0, 101):
        for sampler in (sample_ddim, sample_ddpm):
            with pytest.raises(ValueError, match=f"num_inference_steps is {steps}, expected from 1 to 100"):
                sampler(unet, SCHEDULE, [0], steps)
