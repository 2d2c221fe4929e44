"""Samples of a network's classes in one picture."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusion import NoiseSchedule, OneStepGenerator, num_classes, sample_ddim, sample_ddpm, sample_one_step
from ..report import save_grid
from .arguments import check_output
from .options import load_pretrained
from .presets import class_preset

# Of DDIM and DDPM, where neither the command nor a run says it.
STEPS = 50


def sample(
    pretrained_model_name_or_path: str | None = None,
    preset: str = "digits",
    labels: tuple[int, ...] = (),
    images_per_class: int = 10,
    sampler: Literal["auto", "one_step", "ddim", "ddpm"] = "auto",
    t_init: int | None = None,
    num_inference_steps: int | None = None,
    output: str = "samples.png",
    seed: int = 0,
) -> str:
    """Draw images of a network's classes into one picture, a row for each class.

    Parameters
    ----------
    pretrained_model_name_or_path : str, optional
        Folder of a run or of a network. Default: the preset's network.
    preset : str
        digits, digits16, cifar10 or stl10.
    labels : tuple of int
        Classes to draw. Default: all.
    images_per_class : int
        Images of each.
    sampler : {"auto", "one_step", "ddim", "ddpm"}
        auto: as a run of unlearning draws (in one step at its t_init, or by its own sampler), otherwise DDIM.
    t_init : int, optional
        Timestep of the one-step sampler. Default: that of the run.
    num_inference_steps : int, optional
        Steps of ddim and ddpm. Default: those of the run, otherwise 50.
    output : str
        The picture, a PNG.
    seed : int
        Seed of the noise.

    Returns
    -------
    str
        What was drawn, in a line to read.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before anything is drawn.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class is {images_per_class}, expected at least 1")
    if not output.endswith(".png"):
        raise ValueError(f"output is {output!r}, expected a file that ends with .png")
    check_output(output)
    network, schedule, source = load_pretrained(pretrained_model_name_or_path, class_preset(preset).network)
    classes = num_classes(network)
    chosen = torch.tensor(labels or range(classes)).repeat_interleave(images_per_class)
    drawing = Drawing.of(network, sampler, t_init, num_inference_steps)
    images = drawing(network, schedule, chosen, seed)
    save_grid(Path(output), images, chosen, tuple(map(str, range(classes))))
    return f"{len(images)} images of {source}, sampler {drawing.sampler}, seed {seed}: {output}"


@dataclass(frozen=True)
class Drawing:
    """How images of a network are drawn.

    Parameters
    ----------
    sampler: "one_step" (at ``t_init``), "ddim" or "ddpm" (in ``num_inference_steps``).
    guidance: further arguments of the two: guidance_scale, clip_sample.
    """

    sampler: str
    t_init: int | None = None
    num_inference_steps: int | None = None
    guidance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, sampler: str, t_init: int | None, num_inference_steps: int | None) -> "Drawing":
        """What was asked for, or what the run that the network is of says. ValueError for one step without t_init."""
        options = options_of(network)
        recorded = options.get("t_init")
        if sampler == "auto" and t_init is None and recorded is None and "eval_sampler" in options:
            guidance = {"guidance_scale": options["eval_guidance_scale"], "clip_sample": options["clip_sample"]}
            steps = options["num_inference_steps"] if num_inference_steps is None else num_inference_steps
            return cls(options["eval_sampler"], None, steps, guidance)
        t_init = recorded if t_init is None else t_init
        if sampler == "auto":
            sampler = "ddim" if t_init is None else "one_step"
        if sampler != "one_step":
            return cls(sampler, None, STEPS if num_inference_steps is None else num_inference_steps)
        if t_init is None:
            raise ValueError("t_init is not given, and the network is not of a run that says it")
        return cls(sampler, t_init)

    def __call__(
        self, network: nn.Module, schedule: NoiseSchedule, labels: Tensor, seed: int, batch_size: int = 256
    ) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of ``labels``."""
        if self.sampler == "one_step":
            generator = OneStepGenerator(schedule, self.t_init)
            return sample_one_step(network, generator, labels, batch_size=batch_size, seed=seed)
        draw = sample_ddim if self.sampler == "ddim" else sample_ddpm
        return draw(
            network, schedule, labels, self.num_inference_steps, batch_size=batch_size, seed=seed, **self.guidance
        )

    def describe(self) -> dict[str, Any]:
        """What settles the images beside network, labels and seed, as JSON."""
        return {
            "sampler": self.sampler,
            "t_init": self.t_init,
            "num_inference_steps": self.num_inference_steps,
            **self.guidance,
        }


def options_of(network: nn.Module) -> dict[str, Any]:
    """The options of the run, or the configuration of the pipeline, that the network was read from, local or of the
    hub; empty where it was read from neither."""
    # diffusers keeps the folder that it read.
    path = network.config.get("_name_or_path")
    return {} if path is None else recorded_options(Path(path))


def recorded_options(path: Path) -> dict[str, Any]:
    """The same for the folder of a network, a run or a pipeline."""
    for folder in (path, path.parent):
        for name in ("config.json", "model_index.json"):
            try:
                said = json.loads((folder / name).read_text())
                found = said.get("options", said)
                if "t_init" in found or "eval_sampler" in found:
                    return found
            except (OSError, ValueError, TypeError, AttributeError):
                continue
    return {}
