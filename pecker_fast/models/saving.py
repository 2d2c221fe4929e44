"""Saving the network of a run in a format of diffusers."""

import os
from pathlib import Path

from torch import nn

from ..diffusion import NoiseSchedule, Parametrisation, Sampler, TextConditioned
from .folders import save_many_step_pipeline, save_network, save_one_step_pipeline
from .stable_diffusion import save_text_network


def save_result(
    folder: str | os.PathLike, network: nn.Module, schedule: Parametrisation, sampler: Sampler | None = None
) -> None:
    """Write the network of a run or checkpoint.

    Parameters
    ----------
    folder : str or os.PathLike
        Folder of a run or of a checkpoint. The U-Net goes into ``folder/unet``.
    network : nn.Module
        A class-conditional U-Net, or a ``TextConditioned`` one.
    schedule : Parametrisation
        The schedule that it was trained on.
    sampler : Sampler, optional
        How a class-conditional network draws: it is saved as a pipeline that draws so. None: as a network alone.

    Raises
    ------
    ValueError
        If the network is of another architecture, or the sampler does not fit it.
    """
    folder = Path(folder)
    if isinstance(network, TextConditioned):
        save_text_network(folder / "unet", network)
    elif sampler is None or (sampler.t_init is None and not isinstance(schedule, NoiseSchedule)):
        # The pipeline that samples in many steps has the samplers of variance-preserving schedules.
        save_network(folder / "unet", network, schedule)
    elif sampler.t_init is not None:
        save_one_step_pipeline(folder, network, schedule, sampler.t_init)
    else:
        save_many_step_pipeline(folder, network, schedule, sampler)
