"""Saving the network of a run in a format of diffusers."""

import os
from pathlib import Path

from torch import nn

from ..diffusion import NoiseSchedule, TextConditioned
from .folders import save_network, save_one_step_pipeline
from .stable_diffusion import save_text_network


def save_result(
    folder: str | os.PathLike, network: nn.Module, schedule: NoiseSchedule, t_init: int | None = None
) -> None:
    """Write the network of a run or checkpoint.

    Parameters
    ----------
    folder : str or os.PathLike
        Folder of a run or of a checkpoint. The U-Net goes into ``folder/unet``.
    network : nn.Module
        A class-conditional U-Net, or a ``TextConditioned`` one.
    schedule : NoiseSchedule
        The schedule that it was trained on.
    t_init : int, optional
        Timestep of a class-conditional one-step generator, which is saved as a pipeline. None if the network draws in
        many steps.

    Raises
    ------
    ValueError
        If the network is of another architecture, or ``t_init`` is out of range.
    """
    folder = Path(folder)
    if isinstance(network, TextConditioned):
        save_text_network(folder / "unet", network)
    elif t_init is not None:
        save_one_step_pipeline(folder, network, schedule, t_init)
    else:
        save_network(folder / "unet", network, schedule)
