"""Networks and generators in folders that diffusers reads."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from typing_extensions import NotRequired

from ..checks import check_choice
from ..diffusion.networks import unwrap
from ..diffusion.parametrisation import Parametrisation
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.unet import check_class_conditional, class_names
from ..files import write_folder
from ..records import POSITIVE, RecordError
from .offline import FIX, loading, read_config, reason
from .schedules import SCHEDULER_CONFIG, read_schedule

if TYPE_CHECKING:
    from diffusers import UNet2DModel

# Name of weight files without the suffix.
WEIGHTS = "diffusion_pytorch_model"
# Its files: the plain ones, or with the name of a variant.
_WEIGHTS = re.compile(rf"{WEIGHTS}(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}})?\.safetensors(?:\.index\.json)?")


class UNetRecord(TypedDict):
    """The fields of a U-Net's config.json that determine what it computes on."""

    _class_name: str
    sample_size: NotRequired[POSITIVE | list[POSITIVE] | None]
    in_channels: NotRequired[POSITIVE]
    out_channels: NotRequired[POSITIVE]
    block_out_channels: NotRequired[list[POSITIVE]]
    down_block_types: NotRequired[list[str]]
    up_block_types: NotRequired[list[str]]
    layers_per_block: NotRequired[POSITIVE | list[POSITIVE]]
    num_class_embeds: NotRequired[POSITIVE | None]
    class_embed_type: NotRequired[str | None]


def read_unet_config(folder: Path, *kinds: str) -> dict[str, Any]:
    """config.json of a network of one of diffusers' classes ``kinds``.

    ValueError if it is missing or damaged, is of another class, or predicts more than the noise.
    """
    path = folder / "config.json"
    config = read_config(path, UNetRecord)
    if config["_class_name"] not in kinds:
        raise ValueError(f"path {folder} has a {config['_class_name']}, expected a {' or a '.join(kinds)}")
    if config.get("sample_size") is None:
        raise RecordError(f"{path} has no sample_size: set it to the height and width of its images; {FIX}")
    channels, outputs = config.get("in_channels"), config.get("out_channels")
    if channels is not None and outputs == 2 * channels:
        raise ValueError(
            f"{path} has out_channels {outputs} for in_channels {channels}: the network also predicts variances, which "
            f"is not supported; expected out_channels {channels}"
        )
    return config


def network_folder(path: str | os.PathLike) -> Path:
    """Return the folder of a network: ``unet`` or ``transformer`` in that of a run or pipeline, otherwise ``path``."""
    path = Path(path)
    return next((path / name for name in ("unet", "transformer") if (path / name).is_dir()), path)


def save_network(path: str | os.PathLike, unet: nn.Module, schedule: Parametrisation) -> None:
    """Write a network to ``path/config.json``, ``path/diffusion_pytorch_model.safetensors`` and ``path/scheduler/``.

    ``UNet2DModel.from_pretrained(path)`` and ``DDPMScheduler.from_pretrained(path, subfolder="scheduler")`` read it. If
    the folder exists, files of these names are replaced, each atomically, and others stay.

    Raises
    ------
    ValueError
        If the network is not class-conditional, or ``path`` is a file.
    """
    check_class_conditional(unet)

    def write(folder: Path) -> None:
        unwrap(unet).save_pretrained(folder, safe_serialization=True)
        schedule.to_scheduler().save_pretrained(folder / "scheduler")

    write_folder(path, write)


def save_one_step_pipeline(path: str | os.PathLike, unet: nn.Module, schedule: Parametrisation, t_init: int) -> None:
    """Write a one-step generator as a pipeline.

    A consistency model becomes a ``ConsistencyModelPipeline`` of diffusers. For other networks the folder has
    ``unet/`` as ``save_network`` writes it, ``scheduler/``, ``model_index.json`` and ``pipeline.py``.
    ``OneStepPipeline.from_pretrained(path)`` reads it, and so does ``DiffusionPipeline.from_pretrained(path,
    custom_pipeline=path, trust_remote_code=True)`` if this package is not installed. Existing files are replaced as by
    ``save_network``.

    Raises
    ------
    ValueError
        If the network is not class-conditional, ``t_init`` is out of range, or ``path`` is a file.
    """
    check_class_conditional(unet)
    schedule.check_one_step(t_init)
    scheduler = schedule.to_scheduler()
    if type(scheduler).__name__ == "CMStochasticIterativeScheduler":
        from diffusers import ConsistencyModelPipeline

        pipeline: Any = ConsistencyModelPipeline(unwrap(unet), scheduler)
    else:
        from ..diffusion.pipeline import OneStepPipeline

        pipeline = OneStepPipeline(unwrap(unet), scheduler, t_init, id2label(unet), relation=schedule.relation(t_init))
    _save_pipeline(path, pipeline, schedule)


def save_many_step_pipeline(
    path: str | os.PathLike, unet: nn.Module, schedule: NoiseSchedule, sampler: Sampler
) -> None:
    """Write a network that draws in many steps as a pipeline, which draws as ``sampler`` does.

    The folder has the files that ``save_one_step_pipeline`` writes, with ``ManyStepPipeline`` in place of
    ``OneStepPipeline``.

    Raises
    ------
    ValueError
        If the network is not class-conditional, the sampler is neither "ddim" nor "ddpm", or ``path`` is a file.
    """
    from ..diffusion.many_step_pipeline import SAMPLERS, ManyStepPipeline

    check_class_conditional(unet)
    check_choice("sampler", sampler.kind, SAMPLERS)
    pipeline = ManyStepPipeline(
        unwrap(unet),
        schedule.to_scheduler(SAMPLERS[sampler.kind], prediction_type=schedule.prediction_type),
        eval_sampler=sampler.kind,
        num_inference_steps=sampler.num_inference_steps or schedule.num_train_timesteps,
        eval_guidance_scale=1.0 if sampler.guidance_scale is None else sampler.guidance_scale,
        clip_sample=sampler.clip_sample is None or sampler.clip_sample,
        id2label=id2label(unet),
    )
    _save_pipeline(path, pipeline, schedule)


def id2label(unet: nn.Module) -> dict[str, str] | None:
    """The names of a network's classes as pipelines of diffusers have them; None if it has none."""
    return {str(label): name for label, name in enumerate(class_names(unet))} or None


def _save_pipeline(path: str | os.PathLike, pipeline: Any, schedule: Parametrisation) -> None:
    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        # A second copy, so that unet/ alone can be loaded as a network.
        schedule.to_scheduler().save_pretrained(folder / "unet" / "scheduler")

    write_folder(path, write)


def check_network_folder(path: str | os.PathLike) -> Path:
    """Check the folder of a network except its weights, which may not be downloaded yet.

    Returns
    -------
    Path
        The folder of the network's schedule: ``path/scheduler``, ``path`` itself, or ``scheduler`` beside ``path``.

    Raises
    ------
    ValueError
        If ``path`` is not such a folder, has no schedule, or has a network of another architecture or without class
        labels.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"path {path} is not the folder of a saved network: there is no config.json")
    places = (path / "scheduler", path, path.parent / "scheduler")
    schedule_folder = next((place for place in places if (place / SCHEDULER_CONFIG).is_file()), None)
    if schedule_folder is None:
        raise ValueError(
            f"path {path} is not the folder of a saved network: there is no scheduler/{SCHEDULER_CONFIG}, "
            "which has the noise levels that it was trained on"
        )
    config = read_unet_config(path, "UNet2DModel")
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is None:
        raise ValueError(f"path {path} has a network without class labels, expected num_class_embeds")
    return schedule_folder


def load_network(path: str | os.PathLike) -> tuple["UNet2DModel", Parametrisation]:
    """Read a class-conditional network. Never asks a hub.

    Returns
    -------
    UNet2DModel
        float32 on the CPU in eval mode.
    Parametrisation
        The schedule that the network was trained on, from one of the places in ``check_network_folder``.

    Raises
    ------
    ValueError
        As by ``check_network_folder``, or if the weights cannot be read or do not fit.
    """
    from diffusers import UNet2DModel

    # First, because reading the weights may take long.
    schedule = read_schedule(check_network_folder(path))
    return load_unet(UNet2DModel, path), schedule


def load_unet(kind: type, folder: str | os.PathLike, what: str = "weights") -> Any:
    """Read a network of diffusers' class ``kind``, float32 on the CPU in eval mode. Never asks a hub.

    Parameters
    ----------
    kind : type
        Such as ``UNet2DModel``.
    folder : path-like
        Has config.json and weights: the plain ones, or those of the only variant, such as fp16.
    what : str
        What is read, for messages.

    Raises
    ------
    ValueError
        If the weights cannot be read, do not fit, or are not finite.
    """
    folder = Path(folder)
    variant = _variant(folder)
    for file in sorted(folder.glob(f"{WEIGHTS}*.safetensors")):
        check_weights_file(file)
    with loading(folder, what):
        model, info = kind.from_pretrained(  # type: ignore[attr-defined]
            folder,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            torch_dtype=torch.float32,
            variant=variant,
        )
    # diffusers initialises missing weights at random.
    wrong = [
        f"{len(keys)} {name.replace('_', ' ')}, such as {min(map(str, keys))}" for name, keys in info.items() if keys
    ]
    if wrong:
        raise ValueError(f"{folder} has weights that do not fit its configuration: {'; '.join(wrong)}")
    for name, value in model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{folder} has weights that are inf or NaN, such as {name}: take an earlier checkpoint")
    return model.eval()


def _variant(folder: Path) -> str | None:
    """The variant of the weights in a folder, None for the plain ones. ValueError if there are none, or several."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {match[1] for match in map(_WEIGHTS.fullmatch, names) if match}
    if None in found:
        return None
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ValueError(f"{folder} has weights of the variants {', '.join(sorted(found))} only: keep one of them")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    instead = f": {pickles[0]} is a pickle, save it with safe_serialization=True" if pickles else ""
    raise ValueError(f"{folder} has no safetensors weights ({WEIGHTS}.safetensors){instead}")


def check_weights_file(path: Path) -> None:
    """Raise ValueError unless a safetensors file may have the weights of a network, from its header alone."""
    try:
        with safe_open(os.fspath(path), framework="pt") as content:
            metadata, names = content.metadata() or {}, list(content.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error
    kind = "pecker_fast.delta" if "delta" in metadata else metadata.get("format", "pt")
    if kind.startswith("pecker_fast."):
        kind = kind.partition(".")[2].replace("_", " ")
        raise ValueError(f"{path} has no weights of a network: it is the file of a {kind}")
    if names and all(name.startswith("module.") for name in names):
        raise ValueError(
            f"{path} has names that begin with module., the wrapper of DataParallel: save the state dict of its .module"
        )
