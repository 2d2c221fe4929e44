"""Samples of a class-conditional network: in one step, by DDIM, by ancestral sampling (DDPM).

The noise of sample i depends on the seed and i alone, or on a seed of its own, so it is the same for every batch size,
every number of samples and every device, and the three samplers start from the same noise.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..checks import as_labels, check_int
from .generator import OneStepGenerator, predict_eps
from .networks import embedding_count, unwrap
from .schedule import NoiseSchedule

# Seeds of torch's CPU generator (a Mersenne Twister) count modulo this.
SEEDS = 2**32


class _Noise:
    """Start noise, drawn in order from one generator, and a generator a sample for the noise of later steps."""

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
        """z of the next ``count`` samples. One draw a sample: torch's numbers depend on the size of a draw."""
        return torch.stack([torch.randn(self.shape, generator=self.generator) for _ in range(count)])

    def generators(self, count: int) -> list[torch.Generator]:
        """Generators of the next ``count`` samples, with seeds that differ."""
        made = [torch.Generator().manual_seed((self._next + i) % SEEDS) for i in range(count)]
        self._next += count
        return made


class _OwnNoise:
    """Noise of samples that have a seed each: what each would have alone."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], count: int) -> None:
        if len(seeds) != count:
            raise ValueError(f"seed has {len(seeds)} seeds, expected {count}, one for each label")
        each = [_Noise(seed, shape) for seed in seeds]
        self._starts, self._generators = iter(each), iter(each)

    def start(self, count: int) -> Tensor:
        return torch.cat([next(self._starts).start(1) for _ in range(count)])

    def generators(self, count: int) -> list[torch.Generator]:
        return [next(self._generators).generators(1)[0] for _ in range(count)]


def sample_shape(network: nn.Module, shape: tuple[int, int, int] | None = None) -> tuple[int, ...]:
    """(C, H, W) of what a network draws: ``shape``, or what its configuration says. ValueError where it does not."""
    if shape is not None:
        if len(shape) != 3:
            raise ValueError(f"shape is {shape}, expected (C, H, W)")
        for size in shape:
            check_int("shape", size, 1)
        return tuple(shape)
    config = getattr(unwrap(network), "config", None)
    size = config.get("sample_size") if config is not None else None
    if size is None:
        raise ValueError("shape is None and the network does not say its sample_size: give (C, H, W)")
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def network_device(network: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _draws_latents(network: nn.Module) -> bool:
    return getattr(unwrap(network), "draws_latents", False)


def ddim_scheduler(network: nn.Module, schedule: NoiseSchedule, clip_sample: bool | None = None):
    """diffusers' ``DDIMScheduler`` for what ``network`` draws: pixels, or latents as Stable Diffusion's steps are."""
    from diffusers import DDIMScheduler

    if _draws_latents(network):
        options = {"clip_sample": bool(clip_sample), "set_alpha_to_one": False, "steps_offset": 1}
    else:
        options = {"clip_sample": clip_sample is None or clip_sample}
    return schedule.to_scheduler(DDIMScheduler, **options)


def sample_in_batches(
    network: nn.Module,
    labels: Tensor | Sequence[int],
    step: Callable[[Tensor, Tensor, list[torch.Generator]], Tensor],
    *,
    batch_size: int,
    seed: int | torch.Generator | Sequence[int],
    device: torch.device,
    shape: tuple[int, int, int] | None,
) -> Tensor:
    """Runs ``step(z, labels, generators)`` batch by batch."""
    check_int("batch_size", batch_size, 1)
    labels = as_labels(labels, embedding_count(network))
    # Latents have no bounds.
    bounded = not _draws_latents(network)
    shape = sample_shape(network, shape)
    noise = _OwnNoise(seed, shape, len(labels)) if isinstance(seed, Sequence) else _Noise(seed, shape)

    def batches() -> Iterator[Tensor]:
        for part in labels.split(batch_size):
            z = noise.start(len(part)).to(device)
            drawn = step(z, part.to(device), noise.generators(len(part))).float()
            yield drawn.clamp(-1, 1) if bounded else drawn

    with torch.no_grad():
        return torch.cat(list(batches()))


def sample_one_step(
    network: nn.Module,
    generator: OneStepGenerator,
    labels: Tensor | Sequence[int],
    *,
    batch_size: int = 256,
    seed: int | torch.Generator | Sequence[int] = 0,
    device: torch.device | str | None = None,
    shape: tuple[int, int, int] | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Samples G_theta(z, c) of a one-step generator.

    Parameters
    ----------
    network: theta, in the mode the caller wants: put it in eval mode unless dropout is meant.
    generator: schedule and t_init; moved to ``device``.
    labels: N class labels, integers of shape (N,) or a sequence.
    batch_size: samples a call of the network. It does not change the noise (results differ by rounding at most).
    seed: an integer >= 0; or a CPU ``torch.Generator``, which is advanced; or N integers, one a sample, whose noise is
        then that of a sample drawn alone.
    device: of the network by default.
    shape: (C, H, W); that in the network's configuration by default.
    guidance_scale: as in ``predict_eps``.

    Returns
    -------
    float32 (N, C, H, W) on ``device``, clamped to [-1, 1] unless the network draws latents, in the order of ``labels``.

    Raises
    ------
    ValueError, TypeError: the argument that is wrong, such as a label out of range.
    """
    device = network_device(network, device)
    placed = generator.to(device)

    def step(z: Tensor, labels: Tensor, _) -> Tensor:
        return placed(network, z, labels, guidance_scale=guidance_scale)

    return sample_in_batches(network, labels, step, batch_size=batch_size, seed=seed, device=device, shape=shape)


def sample_ddim(
    network: nn.Module,
    schedule: NoiseSchedule,
    labels: Tensor | Sequence[int],
    num_inference_steps: int = 50,
    *,
    batch_size: int = 256,
    seed: int | torch.Generator | Sequence[int] = 0,
    device: torch.device | str | None = None,
    shape: tuple[int, int, int] | None = None,
    guidance_scale: float = 1.0,
    null_label: int | None = None,
    clip_sample: bool | None = None,
) -> Tensor:
    """Deterministic DDIM samples (arXiv 2010.02502, eta = 0), by diffusers' ``DDIMScheduler``.

    Parameters
    ----------
    schedule: that the network was trained with.
    num_inference_steps: from 1 to T, evenly spaced.
    guidance_scale, null_label: as in ``predict_eps``.
    clip_sample: whether the x_0 predicted at every step is clamped to [-1, 1]; by default where pixels are drawn.
        Latents are not, and their steps are Stable Diffusion's: each a timestep later, the last one ends at t = 0.

    Other arguments, result and errors are those of ``sample_one_step``.
    """
    scheduler = ddim_scheduler(network, schedule, clip_sample)
    guidance = {"guidance_scale": guidance_scale, "null_label": null_label}
    step = _iterate(network, scheduler, num_inference_steps, guidance, ancestral=False)
    device = network_device(network, device)
    return sample_in_batches(network, labels, step, batch_size=batch_size, seed=seed, device=device, shape=shape)


def ddim_through(
    network: nn.Module,
    schedule: NoiseSchedule,
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
    z : Tensor
        Standard normal noise, (B, C, H, W).

    Returns
    -------
    Tensor
        float32 (B, C, H, W). Other arguments and errors are those of ``sample_ddim``.
    """
    scheduler = ddim_scheduler(network, schedule, clip_sample)
    guidance = {"guidance_scale": guidance_scale}
    return _iterate(network, scheduler, num_inference_steps, guidance, ancestral=False)(z, labels, [])


def sample_ddpm(
    network: nn.Module,
    schedule: NoiseSchedule,
    labels: Tensor | Sequence[int],
    num_inference_steps: int | None = None,
    *,
    batch_size: int = 256,
    seed: int | torch.Generator | Sequence[int] = 0,
    device: torch.device | str | None = None,
    shape: tuple[int, int, int] | None = None,
    guidance_scale: float = 1.0,
    null_label: int | None = None,
    clip_sample: bool | None = None,
    variance_type: str = "fixed_small",
) -> Tensor:
    """Ancestral samples (DDPM, arXiv 2006.11239, Algorithm 2), by diffusers' ``DDPMScheduler``.

    Parameters
    ----------
    num_inference_steps: all T steps by default.
    variance_type: of the noise added: "fixed_small" (the posterior's) or "fixed_large" (beta_t).

    Other arguments, result and errors are those of ``sample_ddim``.
    """
    from diffusers import DDPMScheduler

    if variance_type not in ("fixed_small", "fixed_large"):
        raise ValueError(f'variance_type is {variance_type!r}, expected "fixed_small" or "fixed_large"')
    steps = schedule.num_train_timesteps if num_inference_steps is None else num_inference_steps
    clip_sample = not _draws_latents(network) if clip_sample is None else clip_sample
    scheduler = schedule.to_scheduler(DDPMScheduler, clip_sample=clip_sample, variance_type=variance_type)
    guidance = {"guidance_scale": guidance_scale, "null_label": null_label}
    step = _iterate(network, scheduler, steps, guidance, ancestral=True)
    device = network_device(network, device)
    return sample_in_batches(network, labels, step, batch_size=batch_size, seed=seed, device=device, shape=shape)


def _iterate(network: nn.Module, scheduler, num_inference_steps: int, guidance: dict, *, ancestral: bool) -> Callable:
    check_int("num_inference_steps", num_inference_steps, 1, scheduler.config.num_train_timesteps + 1)
    # Timesteps stay on the CPU: the scheduler indexes its tables with them.
    scheduler.set_timesteps(num_inference_steps)

    def step(x: Tensor, labels: Tensor, generators: list[torch.Generator]) -> Tensor:
        options = {"generator": generators} if ancestral else {}
        for t in scheduler.timesteps.tolist():
            eps = predict_eps(network, x, t, labels, **guidance)
            x = scheduler.step(eps, t, x, **options).prev_sample
        return x

    return step
