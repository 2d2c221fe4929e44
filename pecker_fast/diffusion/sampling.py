"""Samples of a class-conditional network: in one step, by DDIM, or by ancestral sampling (DDPM).

The noise of sample i depends only on the seed and i, or on the sample's own seed. It is the same for every batch size,
number of samples and device, and the three samplers start from the same noise.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..checks import as_labels, check_int
from .generator import OneStepGenerator, predict
from .networks import embedding_count, unwrap
from .parametrisation import Parametrisation
from .schedule import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

# torch's CPU generator (a Mersenne Twister) takes seeds modulo this.
SEEDS = 2**32


# From the noise, the labels and a generator for each sample to the samples.
Step: TypeAlias = Callable[[Tensor, Tensor, list[torch.Generator]], Tensor]


class _Noise:
    """Initial noise, drawn in order from one generator, and a generator per sample for the noise of later steps."""

    def __init__(self, seed: int | torch.Generator, shape: tuple[int, ...]) -> None:
        if isinstance(seed, torch.Generator):
            if seed.device.type != "cpu":
                raise ValueError(f"seed is a generator on {seed.device}, expected one on the CPU, or an integer")
            self.generator = seed
        else:
            check_int("seed", seed, 0)
            self.generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self._next = int(torch.randint(SEEDS, (), generator=self.generator))

    def start(self, count: int) -> Tensor:
        """z of the next ``count`` samples. Each has its own draw, because torch's numbers depend on a draw's size."""
        return torch.stack([torch.randn(self.shape, generator=self.generator) for _ in range(count)])

    def generators(self, count: int) -> list[torch.Generator]:
        """Generators of the next ``count`` samples, each with a different seed."""
        first = self._next
        self._next += count
        return [torch.Generator().manual_seed((first + i) % SEEDS) for i in range(count)]


class _OwnNoise:
    """Noise of samples with a seed each: that of a sample drawn alone."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], count: int) -> None:
        if len(seeds) != count:
            raise ValueError(f"seed has {len(seeds)} seeds, expected {count}, one for each label")
        noises = [_Noise(seed, shape) for seed in seeds]
        self._starts, self._generators = iter(noises), iter(noises)

    def start(self, count: int) -> Tensor:
        return torch.cat([next(self._starts).start(1) for _ in range(count)])

    def generators(self, count: int) -> list[torch.Generator]:
        return [next(self._generators).generators(1)[0] for _ in range(count)]


def sample_shape(network: nn.Module, shape: tuple[int, int, int] | None = None) -> tuple[int, ...]:
    """Return (C, H, W) of a network's samples: ``shape`` if it is not None, otherwise from the configuration.

    Raises
    ------
    ValueError
        If ``shape`` is not (C, H, W), or the configuration has no sample_size.
    """
    if shape is not None:
        if len(shape) != 3:
            raise ValueError(f"shape is {shape}, expected (C, H, W)")
        for size in shape:
            check_int("shape", size, 1)
        return tuple(shape)
    config = getattr(unwrap(network), "config", None)
    size = config.get("sample_size") if config is not None else None
    if size is None:
        raise ValueError("shape is None and the network's configuration has no sample_size: expected (C, H, W)")
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def network_device(network: nn.Module) -> torch.device:
    """Device of the network's first parameter; the CPU if it has none."""
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _draws_latents(network: nn.Module) -> bool:
    return getattr(unwrap(network), "draws_latents", False)


def _clips(network: nn.Module, clip_sample: bool | None) -> bool:
    """Whether x_0 is clamped: by default that of pixels, not of latents."""
    return not _draws_latents(network) if clip_sample is None else clip_sample


def ddim_scheduler(network: nn.Module, schedule: NoiseSchedule, clip_sample: bool | None = None) -> "DDIMScheduler":
    """diffusers' ``DDIMScheduler`` for pixels, or for latents with the timesteps of Stable Diffusion."""
    from diffusers import DDIMScheduler

    latents = {"set_alpha_to_one": False, "steps_offset": 1} if _draws_latents(network) else {}
    return schedule.to_scheduler(DDIMScheduler, clip_sample=_clips(network, clip_sample), **latents)


def sample_in_batches(
    network: nn.Module,
    labels: Tensor | Sequence[int],
    step: Step,
    *,
    batch_size: int,
    seed: int | torch.Generator | Sequence[int],
    shape: tuple[int, int, int] | None,
) -> Tensor:
    """Call ``step(z, labels, generators)`` batch by batch on the network's device."""
    check_int("batch_size", batch_size, 1)
    labels = as_labels(labels, embedding_count(network))
    device = network_device(network)
    # Latents have no bounds.
    bounded = not _draws_latents(network)
    shape = sample_shape(network, shape)
    noise = _OwnNoise(seed, shape, len(labels)) if isinstance(seed, Sequence) else _Noise(seed, shape)

    def batches() -> Iterator[Tensor]:
        for part in labels.split(batch_size):
            z = noise.start(len(part)).to(device)
            samples = step(z, part.to(device), noise.generators(len(part))).float()
            yield samples.clamp(-1, 1) if bounded else samples

    with torch.no_grad():
        return torch.cat(list(batches()))


def sample_one_step(
    network: nn.Module,
    generator: OneStepGenerator,
    labels: Tensor | Sequence[int],
    *,
    batch_size: int = 256,
    seed: int | torch.Generator | Sequence[int] = 0,
    shape: tuple[int, int, int] | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Draw samples G_theta(z, c) of a one-step generator.

    Parameters
    ----------
    network : nn.Module
        theta, in the mode the caller wants: eval mode unless dropout is meant.
    generator : OneStepGenerator
        Schedule and t_init, on any device.
    labels : Tensor or sequence of int
        N class labels, integers (N,).
    batch_size : int
        Samples in a call of the network. It does not change the noise; results differ by rounding at most.
    seed : int, torch.Generator or sequence of int
        An integer of at least 0; a CPU generator, which is advanced; or N integers, one for each sample, whose noise is
        then that of a sample drawn alone.
    shape : tuple of int, optional
        (C, H, W); from the network's configuration by default.
    guidance_scale : float
        As in ``predict``.

    Returns
    -------
    Tensor
        float32 (N, C, H, W) on the network's device, in the order of ``labels``, clamped to [-1, 1] unless the network
        draws latents.

    Raises
    ------
    ValueError, TypeError
        If an argument has an invalid value or type, such as a label out of range.
    """
    generator = generator.to(network_device(network))

    def step(z: Tensor, labels: Tensor, _: list[torch.Generator]) -> Tensor:
        return generator(network, z, labels, guidance_scale=guidance_scale)

    return sample_in_batches(network, labels, step, batch_size=batch_size, seed=seed, shape=shape)


def sample_ddim(
    network: nn.Module,
    schedule: Parametrisation,
    labels: Tensor | Sequence[int],
    num_inference_steps: int = 50,
    *,
    batch_size: int = 256,
    seed: int | torch.Generator | Sequence[int] = 0,
    shape: tuple[int, int, int] | None = None,
    guidance_scale: float = 1.0,
    clip_sample: bool | None = None,
) -> Tensor:
    """Draw deterministic DDIM samples (arXiv 2010.02502, eta = 0).

    With diffusers' ``DDIMScheduler`` for variance-preserving schedules; for others by ``Parametrisation.step``, which
    is Euler's method.

    Parameters
    ----------
    network, labels, batch_size, seed, shape, guidance_scale
        As in ``sample_one_step``.
    schedule : Parametrisation
        The schedule that the network was trained on.
    num_inference_steps : int
        From 1 to T, evenly spaced.
    clip_sample : bool, optional
        Whether the x_0 predicted at each step is clamped to [-1, 1]. By default it is clamped if the network draws
        pixels. Latents take the timesteps of Stable Diffusion: each one later, and the last step ends at t = 0.

    Returns
    -------
    Tensor
        As ``sample_one_step`` returns.

    Raises
    ------
    ValueError, TypeError
        If an argument has an invalid value or type.
    """
    step = _ddim(network, schedule, num_inference_steps, guidance_scale, clip_sample)
    return sample_in_batches(network, labels, step, batch_size=batch_size, seed=seed, shape=shape)


def ddim_through(
    network: nn.Module,
    schedule: Parametrisation,
    z: Tensor,
    labels: Tensor,
    num_inference_steps: int = 50,
    *,
    guidance_scale: float = 1.0,
    clip_sample: bool | None = None,
) -> Tensor:
    """Draw the DDIM samples that start from ``z``, not clamped at the end, with the gradient of ``z``.

    Memory grows with the number of steps if gradients are recorded.

    Parameters
    ----------
    network, schedule, num_inference_steps, guidance_scale, clip_sample
        As in ``sample_ddim``.
    z : Tensor
        Standard normal noise, (B, C, H, W).
    labels : Tensor
        Integers, (B,).

    Returns
    -------
    Tensor
        float32 (B, C, H, W).

    Raises
    ------
    ValueError, TypeError
        If an argument has an invalid value or type.
    """
    return _ddim(network, schedule, num_inference_steps, guidance_scale, clip_sample)(z, labels, [])


def sample_ddpm(
    network: nn.Module,
    schedule: Parametrisation,
    labels: Tensor | Sequence[int],
    num_inference_steps: int | None = None,
    *,
    batch_size: int = 256,
    seed: int | torch.Generator | Sequence[int] = 0,
    shape: tuple[int, int, int] | None = None,
    guidance_scale: float = 1.0,
    clip_sample: bool | None = None,
) -> Tensor:
    """Draw ancestral samples (DDPM, arXiv 2006.11239, Algorithm 2).

    With diffusers' ``DDPMScheduler`` for variance-preserving schedules; for others by ``Parametrisation.step``. The
    noise that each step adds has the variance of the posterior ("fixed_small").

    Parameters
    ----------
    network, schedule, labels, batch_size, seed, shape, guidance_scale, clip_sample
        As in ``sample_ddim``.
    num_inference_steps : int, optional
        From 1 to T; T by default.

    Returns
    -------
    Tensor
        As ``sample_one_step`` returns.

    Raises
    ------
    ValueError, TypeError
        If an argument has an invalid value or type.
    """
    steps = schedule.num_train_timesteps if num_inference_steps is None else num_inference_steps
    clips = _clips(network, clip_sample)
    step: Step
    if isinstance(schedule, NoiseSchedule):
        from diffusers import DDPMScheduler

        scheduler = schedule.to_scheduler(DDPMScheduler, clip_sample=clips, variance_type="fixed_small")
        step = _iterate(network, schedule, scheduler, steps, guidance_scale, ancestral=True)
    else:
        step = _levels(network, schedule, steps, guidance_scale, clips, ancestral=True)
    return sample_in_batches(network, labels, step, batch_size=batch_size, seed=seed, shape=shape)


def _ddim(
    network: nn.Module,
    schedule: Parametrisation,
    num_inference_steps: int,
    guidance_scale: float,
    clip_sample: bool | None,
) -> Step:
    if isinstance(schedule, NoiseSchedule):
        scheduler = ddim_scheduler(network, schedule, clip_sample)
        return _iterate(network, schedule, scheduler, num_inference_steps, guidance_scale, ancestral=False)
    clips = _clips(network, clip_sample)
    return _levels(network, schedule, num_inference_steps, guidance_scale, clips, ancestral=False)


def _levels(
    network: nn.Module,
    schedule: Parametrisation,
    num_inference_steps: int,
    guidance_scale: float,
    clip_sample: bool,
    *,
    ancestral: bool,
) -> Step:
    """Sampling over evenly spaced levels of any schedule, from the last one to x_0."""
    size = schedule.num_train_timesteps
    check_int("num_inference_steps", num_inference_steps, 1, size + 1)
    times = [size - 1 - i * size // num_inference_steps for i in range(num_inference_steps)]

    def step(z: Tensor, labels: Tensor, generators: list[torch.Generator]) -> Tensor:
        levels = schedule.to(z.device)
        x = levels.start(z, times[0])
        for t, s in zip(times, [*times[1:], None], strict=True):
            prediction = predict(network, levels, x, t, labels, guidance_scale)
            fresh = None
            if ancestral and s is not None:
                fresh = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators])
                fresh = fresh.to(x.device)
            x = levels.step(x, prediction, t, s, fresh, clip_sample)
        return x

    return step


def _iterate(
    network: nn.Module,
    schedule: NoiseSchedule,
    scheduler: Any,
    num_inference_steps: int,
    guidance_scale: float,
    *,
    ancestral: bool,
) -> Step:
    check_int("num_inference_steps", num_inference_steps, 1, scheduler.config.num_train_timesteps + 1)
    # Timesteps stay on the CPU, because the scheduler indexes its tables with them.
    scheduler.set_timesteps(num_inference_steps)

    def step(x: Tensor, labels: Tensor, generators: list[torch.Generator]) -> Tensor:
        options = {"generator": generators} if ancestral else {}
        levels = schedule.to(x.device)
        for t in scheduler.timesteps.tolist():
            eps = predict(network, levels, x, t, labels, guidance_scale)
            x = scheduler.step(eps, t, x, **options).prev_sample
        return x

    return step
