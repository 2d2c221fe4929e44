"""How images of a network are drawn: one description for training, evaluation, probes and the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_int, check_number
from .generator import OneStepGenerator
from .parametrisation import Parametrisation
from .sampling import ddim_through, sample_ddim, sample_ddpm, sample_one_step
from .sld import sample_sld, sld_config
from .unet import guidance_scale, sampling_steps

Kind = Literal["one_step", "ddim", "ddpm", "sld"]
# Steps of DDIM if nobody sets them.
STEPS = 50
# Options that a kind requires, and options that it allows besides those that all kinds allow.
_REQUIRED = {
    "one_step": ("t_init",),
    "ddim": ("num_inference_steps",),
    "ddpm": (),
    "sld": ("num_inference_steps", "sld", "safety_text"),
}
_ALLOWED = {
    "one_step": ("num_inference_steps",),
    "ddim": ("clip_sample",),
    "ddpm": ("num_inference_steps", "clip_sample"),
    "sld": ("safety_label",),
}


@dataclass(frozen=True)
class Sampler:
    """How images of a network are drawn. It holds no network and no schedule, and can be written as JSON.

    Parameters
    ----------
    kind : {"one_step", "ddim", "ddpm", "sld"}
        One evaluation at ``t_init``; DDIM; ancestral sampling (DDPM); or DDIM with safe latent diffusion.
    t_init : int, optional
        Timestep at which a one-step generator is fed noise. Required by "one_step", refused by the others.
    num_inference_steps : int, optional
        Steps of "ddim" and "sld", which require it, and of "ddpm", whose default is every timestep. 1 or None for
        "one_step".
    guidance_scale : float, optional
        w of eps_u + w (eps_c - eps_u). None: no guidance, which 1 is too; of "sld" the published 7.5.
    clip_sample : bool, optional
        Whether "ddim" and "ddpm" clamp the x_0 predicted at each step to [-1, 1]. By default if the network draws
        pixels.
    sld : str, optional
        Name of the configuration of "sld": weak, medium, strong or max.
    safety_text : str, optional
        The text that "sld" steers away from.
    safety_label : int, optional
        Label of ``safety_text`` in the network's table of prompts, which ``draw`` needs.
    batch_size : int
        Samples in a call of the network. It does not change the noise.

    Raises
    ------
    ValueError, TypeError
        If an option is missing, out of range, or not one of this kind's.
    """

    kind: Kind
    t_init: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    clip_sample: bool | None = None
    sld: str | None = None
    safety_text: str | None = None
    safety_label: int | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_choice("sampler", self.kind, get_args(Kind))
        for name in ("t_init", "num_inference_steps", "clip_sample", "sld", "safety_text", "safety_label"):
            value = getattr(self, name)
            if value is None and name in _REQUIRED[self.kind]:
                raise ValueError(f"{name} is not given: the sampler {self.kind} needs it")
            if value is not None and name not in _REQUIRED[self.kind] + _ALLOWED[self.kind]:
                raise ValueError(f"{name} is {value!r}, but the sampler {self.kind} has none: expected None")
        if self.t_init is not None:
            check_int("t_init", self.t_init, 0)
        if self.num_inference_steps is not None:
            check_int("num_inference_steps", self.num_inference_steps, 1, 2 if self.kind == "one_step" else None)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale)
        if self.sld is not None:
            sld_config(self.sld)
        check_int("batch_size", self.batch_size, 1)

    @classmethod
    def one_step_or_ddim(cls, t_init: int | None, num_inference_steps: int, batch_size: int = 256) -> "Sampler":
        """One step at ``t_init``, or DDIM if it is None."""
        if t_init is None:
            return cls("ddim", num_inference_steps=num_inference_steps, batch_size=batch_size)
        return cls("one_step", t_init=t_init, batch_size=batch_size)

    def check(self, num_train_timesteps: int) -> None:
        """Check ``t_init`` and ``num_inference_steps`` against the T of a schedule.

        Raises
        ------
        ValueError
            If one of them is out of range.
        """
        if self.t_init is not None:
            check_int("t_init", self.t_init, 0, num_train_timesteps)
        if self.num_inference_steps is not None:
            check_int("num_inference_steps", self.num_inference_steps, 1, num_train_timesteps + 1)

    @property
    def name(self) -> str:
        """Its name in reports, such as "DDIM, 50 steps"."""
        if self.kind == "one_step":
            return f"one step at {self.t_init}"
        steps = "all" if self.num_inference_steps is None else self.num_inference_steps
        return f"{self.kind.upper()}{'' if self.sld is None else f' ({self.sld})'}, {steps} steps"

    def at(self, t_init: int) -> "Sampler":
        """One step at another timestep."""
        return replace(self, t_init=t_init)

    def draw(
        self,
        network: nn.Module,
        schedule: Parametrisation,
        labels: Tensor | Sequence[int],
        seed: int | torch.Generator | Sequence[int] = 0,
        *,
        shape: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """Draw one sample for each label.

        Parameters
        ----------
        network : nn.Module
            In the mode the caller wants: eval mode unless dropout is meant.
        schedule : Parametrisation
            The schedule that the network was trained on.
        labels : Tensor or sequence of int
            N class labels, or labels of prompts, int (N,).
        seed : int, torch.Generator or sequence of int
            An integer, from which with i the noise of sample i is derived; a CPU generator, which is advanced; or N
            integers, one for each sample, whose noise is then that of a sample drawn alone.
        shape : tuple of int, optional
            (C, H, W); from the network's configuration by default. Not for "sld".

        Returns
        -------
        Tensor
            float32 (N, C, H, W) on the network's device, in [-1, 1] unless the network draws latents.

        Raises
        ------
        ValueError, TypeError
            If an argument does not fit the network or the schedule, such as a label out of range.
        """
        options: dict[str, Any] = {"batch_size": self.batch_size, "seed": seed}
        # The kinds that require them have them.
        steps, t_init, sld = cast(int, self.num_inference_steps), cast(int, self.t_init), cast(str, self.sld)
        if self.guidance_scale is not None:
            options["guidance_scale"] = self.guidance_scale
        if self.kind == "sld":
            if self.safety_label is None:
                raise ValueError("safety_label is not given: expected the label of safety_text")
            return sample_sld(network, schedule, labels, self.safety_label, sld_config(sld), steps, **options)
        options["shape"] = shape
        if self.kind == "one_step":
            return sample_one_step(network, OneStepGenerator(schedule, t_init), labels, **options)
        options["clip_sample"] = self.clip_sample
        draw = sample_ddim if self.kind == "ddim" else sample_ddpm
        return draw(network, schedule, labels, steps, **options)

    def through(self, network: nn.Module, schedule: Parametrisation, z: Tensor, labels: Tensor) -> Tensor:
        """Draw the samples that start from ``z``, with the gradients of ``z`` and of the weights.

        Parameters
        ----------
        network, schedule, labels
            As in ``draw``, on the device of ``z``.
        z : Tensor
            Standard normal noise, (B, C, H, W).

        Returns
        -------
        Tensor
            float32, the shape of ``z``, not clamped.

        Raises
        ------
        ValueError
            If the sampler is neither "one_step" nor "ddim".
        """
        guidance = 1.0 if self.guidance_scale is None else self.guidance_scale
        if self.kind == "one_step":
            generator = OneStepGenerator(schedule, cast(int, self.t_init))
            return generator.through(network, z, labels, guidance_scale=guidance)
        if self.kind == "ddim":
            return ddim_through(
                network,
                schedule,
                z,
                labels,
                cast(int, self.num_inference_steps),
                guidance_scale=guidance,
                clip_sample=self.clip_sample,
            )
        raise ValueError(f"sampler is {self.kind!r}, expected one_step or ddim: the others add noise")

    def describe(self) -> dict[str, Any]:
        """Describe, as JSON, everything that determines the images besides network, labels and seed.

        Folders of samples are named by a hash of it, so its keys are fixed: "sampler", "t_init" and
        "num_inference_steps" always, "guidance_scale", "clip_sample", "sld" and "safety_text" if they are set.
        """
        optional = ("guidance_scale", "clip_sample", "sld", "safety_text")
        return {
            "sampler": self.kind,
            "t_init": self.t_init,
            "num_inference_steps": self.num_inference_steps,
            **{name: getattr(self, name) for name in optional if getattr(self, name) is not None},
        }

    def summary(self) -> dict[str, Any]:
        """Return what a run's metrics.json has of it.

        "sampler"; "sampling_steps", evaluations of the network per image (each is two with guidance); and
        "guidance_scale" if it is set.
        """
        steps = 1 if self.kind == "one_step" else self.num_inference_steps
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {"sampler": self.kind, "sampling_steps": steps, **guidance}


def pretrained_sampler(schedule: Parametrisation, network: nn.Module) -> Sampler:
    """Return how a pretrained network is sampled: a consistency model in one step, others by DDIM.

    DDIM takes the steps and the guidance that the network's configuration names, by default 50 and none, but at most as
    many steps as the schedule has.
    """
    if schedule.one_step_at is not None:
        return Sampler("one_step", t_init=schedule.one_step_at)
    scale = guidance_scale(network)
    guidance = None if scale == 1 else scale
    steps = sampling_steps(network) or STEPS
    return Sampler("ddim", num_inference_steps=min(steps, schedule.num_train_timesteps), guidance_scale=guidance)
