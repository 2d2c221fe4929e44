"""Attacks on text-to-image models that have forgotten a concept: relearning, and concept inversion.

The adversary has the weights and n images of the concept, each with a prompt that names it. The losses are those of
``relearn``, on latents: regression and matching for one-step generators, denoising for all.

* regression, matching, denoising: the network is fine-tuned. The other prompts show what that costs.
* inversion: the weights stay; the embedding of a new word is learned (``LearnedToken``), which then stands for the
  concept in the prompts. By regression for one-step generators, otherwise by denoising.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_literals
from ..diffusion import Parametrisation, PromptTable, Sampler, TextConditioned
from ..unlearning.streams import Streams, derived_seed
from ..unlearning.trained import Trained, choose_trained
from .relearn import ONE_STEP, RelearnOptions, attack_loss, check_steps, fine_tune, own_and_ddim
from .token import LearnedTable, LearnedToken

INVERSION = "inversion"
TEXT_ATTACKS = ("regression", "matching", "denoising", INVERSION)

# Images of some labels to figures of what they show.
Judge = Callable[[Tensor, Sequence[int]], dict[str, float | None]]


@dataclass(frozen=True)
class TextRelearnOptions(RelearnOptions):
    """The recipe: Adam (0.9, 0.999) at a constant rate, all images in every step.

    Parameters
    ----------
    images, steps, learning_rate, pool
        As of ``RelearnOptions``, for fine-tuning.
    embedding_learning_rate : float
        Learning rate of the new word's embedding.
    inversion_steps : tuple of int
        Steps of ``inversion`` after which to measure, ascending.
    trained : {"all", "x", "x-strict", "u"}
        What is fine-tuned.
    batch_size : int
        Images in a call of the network: gradients of smaller batches are summed.
    """

    learning_rate: float = 1e-5
    embedding_learning_rate: float = 5e-3
    inversion_steps: tuple[int, ...] = (50, 100, 200, 500)
    trained: Trained = "all"
    batch_size: int = 4

    def check(self) -> None:
        super().check()
        check_literals(self)
        check_int("batch_size", self.batch_size, 1)
        check_steps("inversion_steps", self.inversion_steps)

    def of(self, attack: str) -> "TextRelearnOptions":
        """The recipe with the steps of an attack."""
        return replace(self, steps=self.inversion_steps) if attack == INVERSION else self

    def work(self, attack: str) -> int:
        return self.of(attack).steps[-1]


def text_attacks_on(sampler: Sampler, chosen: Sequence[str] | None = None) -> tuple[str, ...]:
    """List the attacks that apply to text-to-image models with a sampler; of ``chosen``, if given.

    ValueError if one of ``chosen`` is unknown, or needs a one-step generator and the sampler is another.
    """
    for name in chosen or ():
        check_choice("attacks", name, TEXT_ATTACKS)
        if name in ONE_STEP and sampler.kind != "one_step":
            raise ValueError(f"attacks has {name!r}, which needs a one-step generator")
    excluded = () if sampler.kind == "one_step" else ONE_STEP
    return tuple(name for name in (chosen or TEXT_ATTACKS) if name not in excluded)


@dataclass(frozen=True, eq=False)
class TextExaminer:
    """Judges text-to-image models on fixed prompts and noise, so that differences come from the networks.

    Parameters
    ----------
    schedule : Parametrisation
        The networks' schedule, on their device.
    sampler : Sampler
        The sampler that the network is meant for: one step or DDIM.
    by_ddim : Sampler
        DDIM for the same network.
    concept, near : sequence of int
        Labels of the prompts of the concept, and of those of near concepts, which should be preserved; a label for each
        image.
    decode : callable
        From latents to uint8 images (N, 3, H, W).
    judge : callable
        From images of the concept's prompts, and the place of each in ``concept``, to figures: "ua", in percent.
    judge_near : callable
        The same for near concepts.
    seed : int
        Seed of all noise.
    autocast : callable
        A context in which networks are called.
    """

    schedule: Parametrisation
    sampler: Sampler
    by_ddim: Sampler
    concept: Sequence[int]
    near: Sequence[int]
    decode: Callable[[Tensor], Tensor]
    judge: Judge
    judge_near: Judge
    seed: int = 0
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @torch.no_grad()
    def measure(
        self, network: TextConditioned, sampler: Sampler, concept: Sequence[int] | None = None
    ) -> tuple[dict[str, float | None], Tensor]:
        """Draw and judge; ``concept``: other labels of the concept's prompts.

        Returns
        -------
        figures : dict
            Of both judges.
        images : Tensor
            Of the concept's prompts, uint8.
        """
        concept = self.concept if concept is None else concept
        labels = torch.tensor([*concept, *self.near])
        with self.autocast():
            latents = sampler.draw(network, self.schedule, labels, derived_seed(self.seed, "examiner"))
        images = self.decode(latents)
        own, near = images.split([len(concept), len(self.near)])
        figures = self.judge(own, range(len(own)))
        return {**figures, **(self.judge_near(near, range(len(near))) if len(near) else {})}, own


@dataclass(frozen=True, eq=False)
class TextAdversary:
    """What the adversary has.

    Parameters
    ----------
    latents : Tensor
        Of n images of the concept, float32 (n, C, h, w), on the network's device.
    labels : Tensor
        A prompt that names the concept for each, int64 (n,), on the network's device.
    learned : mapping of int to str
        Label of each prompt with the new word to its text: of prompts for training, and of those that are measured.
    learned_labels : Tensor
        One of them for each image, int64 (n,).
    learned_concept : sequence of int
        The labels in place of ``TextExaminer.concept``.
    initial_word : str
        What the new word starts from.
    """

    latents: Tensor
    labels: Tensor
    learned: dict[int, str] = field(default_factory=dict)
    learned_labels: Tensor | None = None
    learned_concept: Sequence[int] = ()
    initial_word: str = "person"


def attack_text(
    network: TextConditioned,
    examiner: TextExaminer,
    adversary: TextAdversary,
    attack: str,
    options: TextRelearnOptions,
    load_encoders: Callable[[], Sequence[tuple[Any, nn.Module]]],
    embed: Callable[[Sequence[tuple[Any, nn.Module]], Sequence[str]], Any],
    shown: Callable[[int, Sampler, Tensor], Any] = lambda step, sampler, images: None,
    tick: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Attack a network, which is changed, and measure its images.

    Parameters
    ----------
    network : TextConditioned
        On the device of the adversary's latents. Fine-tuning changes its weights in place.
    examiner : TextExaminer
        Measures it.
    adversary : TextAdversary
        Images and prompts.
    attack : str
        One of ``text_attacks_on(examiner.sampler)``.
    options : TextRelearnOptions
        The recipe.
    load_encoders : callable
        Loads tokenizers and text encoders, for ``inversion``.
    embed : callable
        From these and prompts to their conditioning, with gradients.
    shown : callable
        Called with each measurement's step, sampler and images of the concept's prompts.
    tick : callable
        Called after each step.

    Returns
    -------
    list of dict
        Rows for step 0 and each of the attack's steps, one for each sampler: "attack", "sampler", "step", "images" (how
        many the training has seen by then), "loss" (the mean since the previous row; None at step 0), and the figures
        of ``TextExaminer.measure``.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range, or the attack is unknown or does not apply to the sampler.
    """
    options.check()
    text_attacks_on(examiner.sampler, (attack,))
    options = options.of(attack)
    network.eval().requires_grad_(False)
    labels, concept, learned = adversary.labels, examiner.concept, None
    if attack == INVERSION:
        encoders = load_encoders()
        token = LearnedToken(encoders, adversary.initial_word)
        table = PromptTable(network.table.conditioning, network.table.null_label)
        learned = LearnedTable(table, adversary.learned, partial(embed, encoders))
        labels, concept = adversary.learned_labels, adversary.learned_concept
        params: Iterable[nn.Parameter] = token.parameters()
    else:
        choose_trained(network, options.trained, text=True)
        params = [param for _, param in network.named_parameters() if param.requires_grad]
    if hasattr(network.unet, "enable_gradient_checkpointing"):
        network.enable_gradient_checkpointing()
    rate = options.embedding_learning_rate if attack == INVERSION else options.learning_rate
    # Of the embedding attacks ``relearn`` chooses the loss by the sampler, too.
    loss_of = attack_loss(attack, examiner, options)
    samplers = own_and_ddim(examiner) if attack == "denoising" else [examiner.sampler]
    count = len(adversary.latents)
    parts = torch.arange(count).split(options.batch_size)

    def loss(step: int) -> Tensor:
        total = adversary.latents.new_zeros(())
        if learned is not None:
            network.table = learned
        for number, rows in enumerate(parts):
            streams = Streams(adversary.latents.device, examiner.seed, "relearn", f"part {number}", step)
            with examiner.autocast():
                value = loss_of(network, examiner, adversary.latents[rows], labels[rows], streams)
            value = value * len(rows) / count
            value.backward()
            total += value.detach()
        return total

    def measure(step: int, mean: float | None) -> list[dict[str, Any]]:
        if learned is not None:
            network.table = learned.settled()
        rows = []
        for used in samplers:
            figures, images = examiner.measure(network, used, concept)
            shown(step, used, images)
            row = {"attack": attack, "sampler": used.name, "step": step, "images": step * count, "loss": mean}
            rows.append({**row, **figures})
        return rows

    return fine_tune(params, rate, loss, measure, options.steps, tick)
