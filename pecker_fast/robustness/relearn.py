"""Relearning: how quickly does fine-tuning on a few real images restore the class?

The adversary has the weights and n real images. Attacks on one-step generators:

* regression: fix a latent for each image and fit G(z_i, c) to image i. This memorises; does it transfer to other
  latents?
* matching: in each step, fit the nearest of a few new samples to each image (implicit maximum likelihood estimation,
  arXiv 1809.09087). This covers all latents and ties no image to one of them.

Attacks on all networks:

* denoising: the training loss of diffusion models at all timesteps. It turns a one-step generator back into a diffusion
  model, which is therefore sampled by DDIM as well: one step at t_init may not show what it has learnt.
* inversion: train only the embedding of the class (concept inversion, arXiv 2308.01508), by regression for one-step
  generators, otherwise by denoising.
* inversion_random: the same from random embeddings in place of the network's own, and the best of several starts.

The same attacks on images of retained classes show whether harmless fine-tuning restores the class (concept resurgence,
arXiv 2410.08074).
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_number
from ..diffusion import OneStepGenerator, Parametrisation, Sampler, predict, prediction_loss, regression_loss
from ..diffusion.networks import unwrap
from ..unlearning.streams import Streams
from .examiner import Examiner

RANDOM = "inversion_random"
ATTACKS = ("regression", "matching", "denoising", "inversion", RANDOM)
# Attacks on the embedding of the class alone.
EMBEDDING = ("inversion", RANDOM)
# Attacks that need a one-step generator.
ONE_STEP = ("regression", "matching")


class Sampled(Protocol):
    """What an attack needs to know of the network: its schedule, and how it is sampled."""

    schedule: Parametrisation
    sampler: Sampler

    @property
    def by_ddim(self) -> Sampler: ...


@dataclass(frozen=True)
class RelearnOptions:
    """The recipe: Adam (0.9, 0.999) at a constant rate, all images in every step, no dropout, no average of weights.

    Parameters
    ----------
    images : int
        Real images of each forgotten class.
    steps : tuple of int
        Steps after which to measure, ascending.
    learning_rate : float
        Learning rate of all attacks but ``inversion``.
    embedding_learning_rate : float
        Learning rate of ``inversion``; embeddings have the scale of standard normal numbers.
    pool : int
        Samples among which ``matching`` looks for the nearest one.
    starts : int
        Random embeddings that ``inversion_random`` starts from.
    """

    images: int = 16
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    learning_rate: float = 2e-4
    embedding_learning_rate: float = 0.03
    pool: int = 8
    starts: int = 5

    def check(self) -> None:
        """Raise ValueError or TypeError, naming the option, if one is out of range."""
        check_int("relearn_images", self.images, 1)
        check_int("pool", self.pool, 1)
        check_int("inversion_starts", self.starts, 1)
        check_number("learning_rate", self.learning_rate, open_low=True)
        check_number("embedding_learning_rate", self.embedding_learning_rate, open_low=True)
        check_steps("relearn_steps", self.steps)

    def work(self, attack: str) -> int:
        """Steps of Adam that an attack takes."""
        return self.steps[-1] * (self.starts if attack == RANDOM else 1)


def check_steps(name: str, steps: Sequence[int]) -> None:
    """Raise ValueError or TypeError unless ``steps`` are positive integers in ascending order, at least one."""
    if not steps:
        raise ValueError(f"{name} is empty, expected at least one step")
    for step in steps:
        check_int(name, step, 1)
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"{name} is {list(steps)}, expected ascending numbers")


def attacks_on(sampler: Sampler, data: str, chosen: Sequence[str] | None = None) -> tuple[str, ...]:
    """List the attacks that apply to networks with a sampler.

    Parameters
    ----------
    sampler : Sampler
        The network's sampler.
    data : {"forgotten", "retained"}
        Which classes the adversary's images are of.
    chosen : sequence of str, optional
        The attacks to select from; all by default.

    Raises
    ------
    ValueError
        If a chosen attack needs a one-step generator and the sampler is another.
    """
    for name in chosen or ():
        if name in ONE_STEP and sampler.kind != "one_step":
            raise ValueError(f"attacks has {name!r}, which needs a one-step generator")
    excluded = () if sampler.kind == "one_step" else ONE_STEP
    if data == "retained":
        # Images of retained classes do not change the embedding of a forgotten class.
        excluded = (*excluded, *EMBEDDING)
    return tuple(name for name in (chosen or ATTACKS) if name not in excluded)


def own_and_ddim(examiner: Sampled) -> list[Sampler]:
    """List the network's own sampler and, for a one-step generator, DDIM."""
    own = examiner.sampler
    return [own, examiner.by_ddim] if own.kind == "one_step" else [own]


def _regression(adversary: nn.Module, examiner: Sampled, images: Tensor, labels: Tensor, streams: Streams) -> Tensor:
    # Without the step in the stream's place, so that all steps have the same latents.
    fixed = Streams(streams.device, *streams.place[:-1])
    z = fixed.normal("regression z", len(images), images.shape[1:])
    one_step = OneStepGenerator(examiner.schedule, examiner.sampler.t_init)
    return regression_loss(one_step(adversary, z, labels), images)


def matching_loss(
    adversary: nn.Module, one_step: OneStepGenerator, images: Tensor, labels: Tensor, pool: Tensor
) -> Tensor:
    """Compute the regression loss of each image and the nearest of its samples.

    ``images`` is (N, C, H, W), ``labels`` (N,), and ``pool`` has K latents for each image, (N, K, C, H, W).
    """
    n, k = pool.shape[:2]
    with torch.no_grad():
        samples = one_step(adversary, pool.flatten(0, 1), labels.repeat_interleave(k)).unflatten(0, (n, k))
        nearest = (samples - images[:, None]).square().flatten(2).sum(2).argmin(1)
    chosen = pool[torch.arange(n, device=pool.device), nearest]
    return regression_loss(one_step(adversary, chosen, labels), images)


def _denoising(adversary: nn.Module, examiner: Sampled, images: Tensor, labels: Tensor, streams: Streams) -> Tensor:
    schedule = examiner.schedule
    t = streams.timesteps("denoising t", len(images), 0, schedule.num_train_timesteps - 1)
    eps = streams.normal("denoising eps", len(images), images.shape[1:])
    x_t = schedule.add_noise(images, eps, t)
    return prediction_loss(schedule.target(images, eps, t), predict(adversary, schedule, x_t, t, labels))


def attack_loss(attack: str, examiner: Sampled, options: RelearnOptions) -> Callable[..., Tensor]:
    """The loss of an attack: from the network, ``examiner``, images, their labels and ``Streams`` to a scalar."""
    if attack == "matching":
        one_step = OneStepGenerator(examiner.schedule, examiner.sampler.t_init)

        def loss(adversary: nn.Module, examiner: Sampled, images: Tensor, labels: Tensor, streams: Streams) -> Tensor:
            z = streams.normal("matching z", len(images) * options.pool, images.shape[1:])
            return matching_loss(adversary, one_step, images, labels, z.unflatten(0, (len(images), options.pool)))

        return loss
    by_regression = attack == "regression" or (attack in EMBEDDING and examiner.sampler.kind == "one_step")
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
    """Fine-tune a copy of ``network`` and measure its images.

    Parameters
    ----------
    network : nn.Module
        In eval mode. It is not changed.
    examiner : Examiner
        Measures the copy.
    images : Tensor
        Real images, float32 (N, C, H, W) in [-1, 1], on the network's device.
    labels : Tensor
        Their classes, int64 (N,), on the network's device.
    attack : str
        One of ``attacks_on(examiner.sampler, ...)``.
    options : RelearnOptions
        The recipe.
    tick : callable
        Called after each step.

    Returns
    -------
    list of dict
        Rows for step 0 and each of ``options.steps``, one for each sampler: "attack", "sampler", "step", "images" (how
        many the training has seen by then), "loss" (the mean since the previous row; None at step 0), and the figures
        of ``Examiner.measure``. Of several starts, the row of the one with the lowest UA at that step, with its number
        as "start"; "images" counts all starts.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range, or the attack is unknown or does not apply to the sampler.
    """
    options.check()
    check_choice("attack", attack, ATTACKS)
    attacks_on(examiner.sampler, "forgotten", (attack,))
    arguments = (examiner, images, labels, attack, options, tick)
    if attack != RANDOM:
        return _curve(copy.deepcopy(unwrap(network)), *arguments)
    curves = []
    for start in range(options.starts):
        adversary = copy.deepcopy(unwrap(network))
        _randomise(adversary, labels, Streams(images.device, examiner.seed, "relearn start", start))
        curves.append([{**row, "start": start} for row in _curve(adversary, *arguments)])
    best = [min(rows, key=lambda row: row["ua"]) for rows in zip(*curves, strict=True)]
    return [{**row, "images": row["images"] * options.starts} for row in best]


@torch.no_grad()
def _randomise(network: nn.Module, labels: Tensor, streams: Streams) -> None:
    """Replace the embeddings of classes by normal numbers with the mean and the deviation of the whole table."""
    table = network.class_embedding.weight
    rows = labels.unique()
    numbers = streams.normal("embedding", len(rows), table.shape[1:]).to(table.device, table.dtype)
    table[rows] = table.mean() + table.std() * numbers


def _curve(
    adversary: nn.Module,
    examiner: Examiner,
    images: Tensor,
    labels: Tensor,
    attack: str,
    options: RelearnOptions,
    tick: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Fine-tune a network in place; the rows of ``relearn``."""
    adversary.eval().requires_grad_(False)
    embedding = attack in EMBEDDING
    trained = adversary.class_embedding if embedding else adversary
    trained.requires_grad_(True)
    rate = options.embedding_learning_rate if embedding else options.learning_rate
    loss_of = attack_loss(attack, examiner, options)
    samplers = own_and_ddim(examiner) if attack == "denoising" else [examiner.sampler]

    def loss(step: int) -> Tensor:
        value = loss_of(adversary, examiner, images, labels, Streams(images.device, examiner.seed, "relearn", step))
        value.backward()
        return value.detach()

    def measure(step: int, mean: float | None) -> list[dict[str, Any]]:
        row = {"step": step, "images": step * len(images), "loss": mean}
        return [
            {"attack": attack, "sampler": used.name, **row, **examiner.measure(adversary, used)} for used in samplers
        ]

    return fine_tune(trained.parameters(), rate, loss, measure, options.steps, tick)


def fine_tune(
    params: Iterable[nn.Parameter],
    learning_rate: float,
    loss: Callable[[int], Tensor],
    measure: Callable[[int, float | None], list[dict[str, Any]]],
    steps: Sequence[int],
    tick: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Train parameters by Adam (0.9, 0.999) at a constant rate, in place.

    Parameters
    ----------
    params : iterable of Parameter
        What is trained.
    learning_rate : float
        The rate.
    loss : callable
        From the number of a step, from 1, to its loss without a gradient; it adds the gradients to the parameters'.
    measure : callable
        From a number of steps and their mean loss since the last call (None at step 0) to rows.
    steps : sequence of int
        Steps after which to measure, ascending, besides step 0.
    tick : callable
        Called after each step.

    Returns
    -------
    list of dict
        All rows.
    """
    optimizer = torch.optim.Adam(params, lr=learning_rate)
    rows, losses = measure(0, None), []
    for step in range(1, steps[-1] + 1):
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss(step))
        optimizer.step()
        tick()
        if step in steps:
            rows += measure(step, torch.stack(losses).mean().item())
            losses.clear()
    return rows
