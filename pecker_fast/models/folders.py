"""Networks and generators as folders that diffusers reads."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..checks import check_int
from ..diffusion.networks import unwrap
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.unet import check_class_conditional
from ..files import write_folder

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def save_network(path: str | os.PathLike, unet: nn.Module, schedule: NoiseSchedule) -> None:
    """Writes ``path/config.json``, ``path/diffusion_pytorch_model.safetensors`` and ``path/scheduler/``.

    ``UNet2DModel.from_pretrained(path)`` and ``DDPMScheduler.from_pretrained(path, subfolder="scheduler")`` read it.
    Written and synced under a temporary name beside ``path``, then renamed. Where the folder exists, its files of these
    names are replaced, each at once, and others are left.
    """
    from diffusers import DDPMScheduler

    check_class_conditional(unet)

    def write(folder: Path) -> None:
        unwrap(unet).save_pretrained(folder, safe_serialization=True)
        schedule.to_scheduler(DDPMScheduler).save_pretrained(folder / "scheduler")

    write_folder(path, write)


def save_one_step_pipeline(
    path: str | os.PathLike,
    unet: nn.Module,
    schedule: NoiseSchedule,
    t_init: int,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a one-step generator as a pipeline: ``path/unet`` as ``save_network`` does, ``path/scheduler``,
    ``path/model_index.json`` and ``path/pipeline.py``. ``class_names`` become the pipeline's ``id2label``.

    ``OneStepPipeline.from_pretrained(path)`` reads it, and so does ``DiffusionPipeline.from_pretrained(path,
    custom_pipeline=path, trust_remote_code=True)`` where this package is not installed. Written as ``save_network``
    writes.
    """
    from diffusers import DDPMScheduler

    from ..diffusion import pipeline

    check_class_conditional(unet)
    check_int("t_init", t_init, 0, schedule.num_train_timesteps)

    def write(folder: Path) -> None:
        scheduler = schedule.to_scheduler(DDPMScheduler)
        names = None if class_names is None else {str(label): name for label, name in enumerate(class_names)}
        pipeline.OneStepPipeline(unwrap(unet), scheduler, t_init, names).save_pretrained(folder)
        # Once more, so that unet/ alone is a network's folder.
        scheduler.save_pretrained(folder / "unet" / "scheduler")

    write_folder(path, write)


def check_network_folder(path: str | os.PathLike) -> Path:
    """The folder of the schedule of the network in ``path``. Reads no weights, so that these may be yet to come.

    Raises ValueError as ``load_network`` does for all that the weights do not matter to.
    """
    path = Path(path)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(f"path {path} is not the folder of a saved network: there is no {config_file.name}")
    schedulers = [place / "scheduler_config.json" for place in (path / "scheduler", path, path.parent / "scheduler")]
    scheduler_file = next((file for file in schedulers if file.is_file()), None)
    if scheduler_file is None:
        raise ValueError(
            f"path {path} is not the folder of a saved network: there is no scheduler/scheduler_config.json, "
            "which says the noise levels that it was trained on"
        )
    config = json.loads(config_file.read_text())
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"path {path} holds a {config.get('_class_name')}, expected a UNet2DModel")
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is None:
        raise ValueError(f"path {path} holds a network without class labels, expected num_class_embeds")
    return scheduler_file.parent


def load_network(path: str | os.PathLike) -> tuple["UNet2DModel", NoiseSchedule]:
    """The network, float32 on the CPU in eval mode, and the schedule that ``save_network`` wrote.

    The schedule may be in ``path/scheduler``, in ``path`` itself, or beside it, as in a pipeline's folder. Never asks a
    hub. Raises ValueError where ``path`` is no such folder, holds another architecture or a network without class
    labels, lacks its schedule, or has weights that do not fit.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    path = Path(path)
    # Said before the weights are read, which may take long.
    scheduler_folder = check_network_folder(path)
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler.from_pretrained(scheduler_folder, local_files_only=True))
    try:
        unet, info = UNet2DModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except OSError as error:
        raise ValueError(f"path {path} has no weights that can be read: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"path {path} has weights that do not fit its configuration: {error}") from error
    # diffusers fills what is missing with random numbers and goes on.
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"path {path} has weights that do not fit its configuration: {wrong}")
    return unet, schedule
