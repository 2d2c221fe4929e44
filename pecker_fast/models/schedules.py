"""The noise schedule of a model, from the configuration of its scheduler."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..diffusion.schedule import NoiseSchedule
from .offline import read_config

SCHEDULER_CONFIG = "scheduler_config.json"


def schedule_from_config(config: Mapping[str, Any], prediction_types: Sequence[str] = ("epsilon",)) -> NoiseSchedule:
    """Return the noise levels that a network was trained on, from the configuration of a scheduler of diffusers.

    Parameters
    ----------
    config : Mapping
        Configuration of any scheduler that has DDPM's parameters; its class is ignored.
    prediction_types : sequence of str
        What the network may predict: "epsilon", "v_prediction".

    Returns
    -------
    NoiseSchedule
        On the CPU.

    Raises
    ------
    ValueError
        If the network predicts something else, or no signal is left at the last timestep.
    """
    from diffusers import DDPMScheduler

    parameters = inspect.signature(DDPMScheduler).parameters
    scheduler = DDPMScheduler(**{name: value for name, value in config.items() if name in parameters})
    return NoiseSchedule.from_scheduler(scheduler, prediction_types)


def read_schedule(folder: str | os.PathLike, prediction_types: Sequence[str] = ("epsilon",)) -> NoiseSchedule:
    """Apply ``schedule_from_config`` to the ``scheduler_config.json`` in a folder."""
    config = read_config(Path(folder) / SCHEDULER_CONFIG)
    return schedule_from_config(config, prediction_types)
