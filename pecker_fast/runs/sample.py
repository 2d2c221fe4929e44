"""Samples of a network's classes in one picture."""

from pathlib import Path
from typing import Literal

import torch

from ..diffusion import class_names, num_classes
from ..models import resolve
from ..report import save_grid
from .arguments import check_output
from .classes.names import labels_of
from .presets import class_preset


def sample(
    pretrained_model_name_or_path: str | None = None,
    preset: str = "digits",
    labels: tuple[str, ...] = (),
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
        digits, digits16, mnist, images, cifar10 or stl10.
    labels : tuple of str
        Classes to draw, by number or name. Default: all.
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
    check_output(output, ".png")
    model = resolve(pretrained_model_name_or_path, shipped=class_preset(preset).network)
    classes = num_classes(model.network)
    names = class_names(model.network)
    chosen = torch.tensor(labels_of(labels, names, "labels") or range(classes)).repeat_interleave(images_per_class)
    chosen_sampler = model.sampler(sampler, t_init, num_inference_steps)
    images = chosen_sampler.draw(model.network, model.schedule, chosen, seed)
    save_grid(Path(output), images, chosen, names or tuple(map(str, range(classes))))
    return f"{len(images)} images of {model.source}, sampler {chosen_sampler.kind}, seed {seed}: {output}"
