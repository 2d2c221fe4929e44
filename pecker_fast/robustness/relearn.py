"""Relearning: how soon does fine-tuning on a few real images bring the class back?

What an adversary with the weights and n real images would do. One who wants a one-step generator:

* regression: fix a latent for each image, and fit G(z_i, c) to image i. It memorises; does it carry over to other
  latents?
* matching: at every step each image takes the nearest of a few fresh samples, which is fitted to it (implicit maximum
  likelihood, arXiv 1809.09087): all latents are covered, and nothing is tied to one of them.

With any network:

* denoising: the loss that diffusion models are trained on, at all timesteps. It makes a one-step generator a diffusion
  model again, so that it is sampled by DDIM too: one step at t_init may not show what it has learnt.
* inversion: only the class's embedding is trained (concept inversion, arXiv 2308.01508), by regression for one-step
  generators, by denoising otherwise.

The same on images of retained classes tells whether harmless fine-tuning revives the class (concept resurgence, arXiv
2410.08074).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..diffusion import OneStepGenerator, Sampler, noise_prediction_loss, predict_eps, regression_loss
from ..diffusion.networks import unwrap
from ..unlearning.streams import Streams
from .examiner import Examiner

ATTACKS = ("regression", "matching", "denoising", "inversion")
# Those that need a network to draw in one step.
ONE_STEP = ("regression", "matching")


@dataclass(frozen=True)
class RelearnOptions:
    """The recipe: Adam (0.9, 0.999) at a constant rate, all images in every step, no dropout, no average of weights.

    Parameters
    ----------
    images: real images of each forgotten class.
    steps: after which it is measured, ascending.
    learning_rate: of all parameters.
    embedding_learning_rate: of ``inversion``: embeddings start as standard normal numbers.
    pool: samples among which ``matching`` looks for the nearest one.
    """

    images: int = 16
    steps: tuple[int, ...] = (10, 50, 100)
    learning_rate: float = 2e-4
    embedding_learning_rate: float = 0.03
    pool: int = 8

    def check(self) -> None:
        """Raises ValueError or TypeError, naming the option, where one is out of range."""
        check_int("relearn_images", self.images, 1)
        check_int("pool", self.pool, 1)
        check_number("learning_rate", self.learning_rate, open_low=True)
        check_number("embedding_learning_rate", self.embedding_learning_rate, open_low=True)
        if not self.steps:
            raise ValueError("relearn_steps is empty, expected at least one step")
        for step in self.steps:
            check_int("relearn_steps", step, 1)
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"relearn_steps is {list(self.steps)}, expected ascending numbers")


def attacks_on(sampler: Sampler, data: str, chosen: Sequence[str] | None = None) -> tuple[str, ...]:
    """The attacks that make sense for networks sampled so, on images of "forgotten" or "retained" classes.

    ``chosen``: those among which to choose; ValueError where one of them needs a network that draws in one step.
    """
    for name in chosen or ():
        if name in ONE_STEP and sampler.kind != "one_step":
            raise ValueError(f"attacks has {name!r}, which needs a network that draws in one step")
    left_out = () if sampler.kind == "one_step" else ONE_STEP
    if data == "retained":
        # The embedding of a forgotten class takes no part in them.
        left_out = (*left_out, "inversion")
    return tuple(name for name in (chosen or ATTACKS) if name not in left_out)


def own_and_ddim(examiner: Examiner) -> list[Sampler]:
    """The sampler of the network under examination, and DDIM for a generator that draws in one step."""
    own = examiner.sampler
    return [own, examiner.by_ddim] if own.kind == "one_step" else [own]


def _regression(adversary: nn.Module, examiner: Examiner, images: Tensor, labels: Tensor, streams: Streams) -> Tensor:
    # The place of the latents has no step in it: they are the same in every one.
    fixed = Streams(streams.device, *streams.place[:-1])
    z = fixed.normal("regression z", len(images), images.shape[1:])
    one_step = OneStepGenerator(examiner.schedule, examiner.sampler.t_init)
    return regression_loss(one_step(adversary, z, labels), images)


def matching_loss(
    adversary: nn.Module, one_step: OneStepGenerator, images: Tensor, labels: Tensor, pool: Tensor
) -> Tensor:
    """The regression loss of each image and the nearest of its samples.

    ``images``: (N, C, H, W); ``labels``: (N,); ``pool``: latents (N, K, C, H, W), of which each image takes one.
    """
    n, k = pool.shape[:2]
    with torch.no_grad():
        drawn = one_step(adversary, pool.flatten(0, 1), labels.repeat_interleave(k)).unflatten(0, (n, k))
        nearest = (drawn - images[:, None]).square().flatten(2).sum(2).argmin(1)
    chosen = pool[torch.arange(n, device=pool.device), nearest]
    return regression_loss(one_step(adversary, chosen, labels), images)


def _denoising(adversary: nn.Module, examiner: Examiner, images: Tensor, labels: Tensor, streams: Streams) -> Tensor:
    schedule = examiner.schedule
    t = streams.timesteps("denoising t", len(images), 0, schedule.num_train_timesteps - 1)
    eps = streams.normal("denoising eps", len(images), images.shape[1:])
    x_t = schedule.add_noise(images, eps, t)
    return noise_prediction_loss(eps, predict_eps(adversary, x_t, t, labels))


def _loss_of(attack: str, examiner: Examiner, options: RelearnOptions) -> Callable[..., Tensor]:
    if attack == "matching":
        one_step = OneStepGenerator(examiner.schedule, examiner.sampler.t_init)

        def loss(adversary: nn.Module, examiner: Examiner, images: Tensor, labels: Tensor, streams: Streams) -> Tensor:
            z = streams.normal("matching z", len(images) * options.pool, images.shape[1:])
            return matching_loss(adversary, one_step, images, labels, z.unflatten(0, (len(images), options.pool)))

        return loss
    by_regression = attack == "regression" or (attack == "inversion" and examiner.sampler.kind == "one_step")
    return _regression if by_regression else _denoising


def relearn(
    network: nn.Module,
    examiner: Examiner,
    images: Tensor,
    labels: Tensor,
    attack: str,
    options: RelearnOptions,
    tick: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Fine-tunes a copy of ``network`` and measures what it draws.

    Parameters
    ----------
    network: in eval mode; not changed.
    examiner: that measures.
    images, labels: real images float32 (N, C, H, W) in [-1, 1] and their classes int64 (N,), on the network's device.
    attack: one of ``attacks_on`` its sampler.
    tick: called after every step.

    Returns
    -------
    A row for step 0, for each of ``options.steps``, and for each sampler: "attack", "sampler", "step", "loss" (the mean
    since the row before; None at step 0), and what ``Examiner.measure`` gives.
    """
    options.check()
    if attack not in ATTACKS:
        raise ValueError(f"attacks has {attack!r}, expected some of {', '.join(ATTACKS)}")
    attacks_on(examiner.sampler, "forgotten", (attack,))
    adversary = copy.deepcopy(unwrap(network)).eval().requires_grad_(False)
    trained = adversary.class_embedding if attack == "inversion" else adversary
    trained.requires_grad_(True)
    rate = options.embedding_learning_rate if attack == "inversion" else options.learning_rate
    optimizer = torch.optim.Adam(trained.parameters(), lr=rate)
    loss_of = _loss_of(attack, examiner, options)
    samplers = own_and_ddim(examiner) if attack == "denoising" else [examiner.sampler]
    rows, losses = [], []

    def measure(step: int) -> None:
        mean = torch.stack(losses).mean().item() if losses else None
        losses.clear()
        for used in samplers:
            place = {"attack": attack, "sampler": used.name, "step": step, "loss": mean}
            rows.append({**place, **examiner.measure(adversary, used)})

    measure(0)
    for step in range(1, options.steps[-1] + 1):
        streams = Streams(images.device, examiner.seed, "relearn", step)
        loss = loss_of(adversary, examiner, images, labels, streams)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        tick()
        if step in options.steps:
            measure(step)
    return rows
