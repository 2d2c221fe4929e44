"""From a path, a name or an object in memory to a network's weights and schedule.

All networks are read through this module. A model without its schedule or with missing weights is refused, and
configurations are checked before weights are read or downloaded.
"""

import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Union, cast

from torch import nn

from ..diffusion.architectures import ARCHITECTURES
from ..diffusion.networks import unwrap
from ..diffusion.parametrisation import Parametrisation
from ..diffusion.sampler import STEPS, Sampler, pretrained_sampler
from ..diffusion.text import check_text_conditional
from ..diffusion.unet import check_class_conditional
from ..records import COUNT, POSITIVE, RecordError, check_object
from .ancestors import States, load_ancestor
from .folders import load_network, network_folder
from .generators import KNOWN, SUFFIXES, known_generator, one_step_of, read_unet_file
from .hub import fetch_configs, fetch_network, fetch_stable_diffusion, fetch_unet, is_hub_file, is_hub_name
from .loaded import copied, read_stable_diffusion
from .offline import read_config
from .schedules import config_of, schedule_from_config
from .stable_diffusion import Prediction, StableDiffusion, load_text_unet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from typing_extensions import TypeIs

# A path, a name on the hub, a network, or a pipeline of diffusers.
Source = Union[str, os.PathLike, nn.Module, "DiffusionPipeline"]
# Name of the argument in error messages.
NAME = "pretrained_model_name_or_path"


@dataclass(frozen=True, eq=False)
class ClassModel:
    """A class-conditional network with its schedule and metadata.

    Parameters
    ----------
    network : nn.Module
        A ``UNet2DModel``, float32 on the CPU in eval mode, which belongs to the caller.
    schedule : Parametrisation
        The noise levels that it was trained on.
    source : str
        Where it came from: the path, "shipped:<name>", "hub:<name>" or "memory:<class>".
    metadata : dict
        Options of its unlearning run or configuration of its pipeline; empty if it has neither.
    """

    network: nn.Module
    schedule: Parametrisation
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def sampler(
        self,
        kind: Literal["auto", "one_step", "ddim", "ddpm"] = "auto",
        t_init: int | None = None,
        num_inference_steps: int | None = None,
        batch_size: int = 256,
    ) -> Sampler:
        """Return how the network is sampled: by the arguments, otherwise as in its run or pipeline.

        Parameters
        ----------
        kind : {"auto", "one_step", "ddim", "ddpm"}
            "auto": by the run's own sampler; otherwise in one step if ``t_init`` is known, by DDIM if it is not.
        t_init : int, optional
            Timestep of the one-step sampler; that of the run by default.
        num_inference_steps : int, optional
            Steps of the others; by default those of the run with "auto", otherwise those that the network's
            configuration names, or 50.
        batch_size : int
            Samples in a call of the network.

        Raises
        ------
        ValueError
            If ``kind`` is "one_step" and ``t_init`` is unknown, a value is out of range, or one is given that the
            sampler does not use.
        """
        usual = pretrained_sampler(self.schedule, self.network)
        options, steps = self.metadata, usual.num_inference_steps or STEPS
        guidance: dict[str, Any] = {"guidance_scale": usual.guidance_scale}
        if kind in ("ddim", "ddpm") and t_init is not None:
            raise ValueError(f"t_init is {t_init}, but sampler is {kind}, which starts from pure noise: leave it out")
        t_init = options.get("t_init") if t_init is None else t_init
        if kind == "auto" and t_init is None and "eval_sampler" in options:
            kind, steps = options["eval_sampler"], options["num_inference_steps"]
            guidance = {"guidance_scale": options["eval_guidance_scale"], "clip_sample": options["clip_sample"]}
        t_init = self.schedule.one_step_at if t_init is None else t_init
        if kind == "auto":
            kind = "ddim" if t_init is None else "one_step"
        if kind == "one_step":
            if t_init is None:
                raise ValueError("t_init is not given, and the network's metadata does not have it")
            if num_inference_steps is not None:
                raise ValueError(
                    f"num_inference_steps is {num_inference_steps}, but the network is sampled in one step: leave it "
                    "out, or choose sampler ddim or ddpm"
                )
            sampler = Sampler(kind, t_init=t_init, batch_size=batch_size)
        else:
            steps = steps if num_inference_steps is None else num_inference_steps
            sampler = Sampler(cast(Any, kind), num_inference_steps=steps, batch_size=batch_size, **guidance)
        sampler.check(self.schedule.num_train_timesteps)
        return sampler


@dataclass(frozen=True, eq=False)
class TextModel:
    """A text-to-image model. Its weights are read on request.

    Parameters
    ----------
    parts : StableDiffusion
        Text encoder, tokenizer, VAE and scheduler, and the U-Net unless ``unet`` is given.
    source : str
        Where it came from: the path, "hub:<name>" or "memory:<class>".
    metadata : dict
        As of ``ClassModel``.
    unet : Path or nn.Module, optional
        A U-Net in place of that of ``parts``: its folder, its file, or itself.
    """

    parts: StableDiffusion
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    unet: Path | nn.Module | None = None

    @property
    def t_init(self) -> int | None:
        """Timestep at which it draws in one step; None for a model that draws in many."""
        return self.metadata.get("t_init")

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts: as its folder or its name says, otherwise as that of ``parts``."""
        own = None if self.unet is None or isinstance(self.unet, nn.Module) else one_step_of(self.unet)
        return self.parts.prediction if own is None else own.prediction

    def load_unet(self) -> nn.Module:
        """The ``UNet2DConditionModel``, float32 on the CPU in eval mode. ValueError if it cannot be read."""
        if self.unet is None:
            return self.parts.load_unet()
        return resolve_text_unet(self.unet, parts=self.parts, name="model")


def resolve(
    model: Source | None,
    *,
    shipped: str | None = None,
    scheduler: Any = None,
    state: States = "auto",
    name: str = NAME,
) -> ClassModel:
    """Find a class-conditional network.

    Parameters
    ----------
    model : str, PathLike, nn.Module, DiffusionPipeline or None
        Folder of a network, a pipeline or a run; checkpoint file of the public DDPM code of SFD, SalUn or Selective
        Amnesia; name on the Hugging Face hub; a pipeline of diffusers, or a ``UNet2DModel`` with ``scheduler``, which
        is copied; None for the network ``shipped``.
    shipped : str, optional
        Name of the network that comes with the package.
    scheduler : SchedulerMixin or Parametrisation, optional
        The noise levels that a network in memory was trained on.
    state : {"auto", "ema", "model", "score"}
        Which weights of a checkpoint file; see ``load_ancestor``.
    name : str
        Name of the argument in error messages.

    Returns
    -------
    ClassModel

    Raises
    ------
    ValueError
        If there is no such model, or it is not class-conditional, lacks its schedule, or has weights that do not fit.
    """
    path = None if model is None or _is_object(model) else str(model)
    if state != "auto" and (path is None or not Path(path).is_file()):
        raise ValueError(
            f"checkpoint_state is {state!r}, expected auto: only checkpoint files of the public DDPM code have several"
        )
    if model is None:
        if shipped is None:
            raise ValueError(f"{name} is not given, and no network of this preset comes with the package")
        return _class_model(shipped_network(shipped), f"shipped:{shipped}")
    try:
        if path is None:
            return _loaded_class_model(model, scheduler)
        if Path(path).is_file():
            return ClassModel(*load_ancestor(path, state), path)
        if Path(path).exists():
            return _class_model(network_folder(path), path)
        if is_hub_name(path):
            return _class_model(fetch_network(path), f"hub:{path}")
        raise ValueError("there is no such file or folder")
    except ValueError as error:
        raise ValueError(f"{name} is {_shown(model)}: {error}") from error


def resolve_text(model: Source | None, *, base: Source | None = None, name: str = NAME) -> TextModel:
    """Find a text-to-image model, Stable Diffusion 1.x, 2.x or XL. Reads no weights.

    Parameters
    ----------
    model : str, PathLike, nn.Module or DiffusionPipeline
        Folder of a Stable Diffusion or of a run; name on the Hugging Face hub; a pipeline of diffusers, whose parts are
        copied. With ``base`` the folder or file of a U-Net or a ``UNet2DConditionModel``.
    base : str, PathLike or DiffusionPipeline, optional
        The Stable Diffusion that the other parts come from if the model is a U-Net alone.
    name : str
        Name of the argument in error messages.

    Returns
    -------
    TextModel

    Raises
    ------
    ValueError
        If there is no such model, a part is missing, or it predicts neither the noise nor v.
    """
    if model is None:
        raise ValueError(
            f"{name} is not given: expected the folder of a Stable Diffusion, or its name on the hub, such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5 or stabilityai/stable-diffusion-xl-base-1.0"
        )
    if base is not None:
        parts = resolve_text(base, name="base").parts
        if isinstance(model, nn.Module):
            check_text_conditional(unwrap(model))
            return TextModel(parts, _memory(model), {}, model)
        if Path(model).is_file():
            return TextModel(parts, str(model), text_options(model), Path(model))
        folder = network_folder(model)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} is {str(model)!r}: it is not the folder of a U-Net: there is no config.json")
        return TextModel(parts, str(model), text_options(model), folder)
    try:
        if _is_object(model):
            return TextModel(read_stable_diffusion(model), _memory(model), _pipeline_options(model))
        path = str(model)
        if Path(path).is_dir():
            return TextModel(read_stable_diffusion(path), path, text_options(path))
        if not Path(path).exists() and is_hub_name(path):
            parts = fetch_stable_diffusion(path)
            return TextModel(parts, f"hub:{path}", text_options(parts.folder))
        raise ValueError("there is no such folder")
    except ValueError as error:
        raise ValueError(f"{name} is {_shown(model)}: {error}") from error


def resolve_text_unet(model: Source, *, parts: StableDiffusion | None = None, name: str = NAME) -> nn.Module:
    """Find the U-Net of a text-to-image model by itself.

    Parameters
    ----------
    model : str, PathLike, nn.Module or DiffusionPipeline
        Folder of the U-Net, of a run or of a Stable Diffusion; name of a model on the hub; a ``UNet2DConditionModel``
        or a pipeline of diffusers, which is copied. With ``parts`` also a file with weights, or owner/model/file on
        the hub.
    parts : StableDiffusion, optional
        The model whose U-Net has the configuration of the weights in a file.
    name : str
        Name of the argument in error messages.

    Returns
    -------
    UNet2DConditionModel
        float32 on the CPU in eval mode.

    Raises
    ------
    ValueError
        If there is none, it is of another architecture, or its weights do not fit.
    """
    try:
        if _is_object(model):
            unet = unet_of(model)
            check_text_conditional(unet)
            return copied(unet)
        path = Path(model)
        if is_hub_file(str(model)) or (not path.exists() and is_hub_name(str(model))):
            path = fetch_unet(str(model))
        if path.is_file() and path.suffix in SUFFIXES and parts is not None:
            return read_unet_file(path, parts.config("unet"))
        return load_text_unet(network_folder(path))
    except ValueError as error:
        raise ValueError(f"{name} is {_shown(model)}: {error}") from error


def text_options(path: str | os.PathLike) -> dict[str, Any]:
    """``recorded_options``, or those of a known one-step generator by its name."""
    recorded = recorded_options(path)
    try:
        key = None if recorded else known_generator(path)
    except ValueError:
        # For several steps: it is drawn as any model is.
        key = None
    return recorded if key is None else {"t_init": KNOWN[key].one_step.t_init}


def resolve_config(path: str | os.PathLike, *, name: str = NAME) -> dict[str, Any]:
    """Find the configuration of a U-Net of either kind. ValueError if there is none."""
    try:
        return read_config(network_folder(path) / "config.json")
    except RecordError as error:
        raise ValueError(f"{name} is {str(path)!r}, not the folder of a U-Net or of a pipeline: {error}") from error


def conditioning_of(model: Source | None, *, name: str = NAME) -> Literal["classes", "prompts"]:
    """Determine whether a model is conditional on classes or on prompts, from its configuration.

    Raises
    ------
    ValueError
        If there is no such model, or it is neither.
    """
    try:
        if model is None or (not _is_object(model) and Path(model).is_file()):
            return "classes"
        if _is_object(model):
            kind = next((base.__name__ for base in type(unet_of(model)).__mro__ if base.__name__ in _KINDS), None)
        else:
            local = Path(model).exists() or not is_hub_name(str(model))
            folder = network_folder(model if local else fetch_configs(str(model)))
            if not (folder / "config.json").is_file():
                raise ValueError("there is no such file or folder, or no U-Net in it")
            kind = read_config(folder / "config.json").get("_class_name")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"it is a {kind}, expected one of {', '.join(_KINDS)}")
        return _KINDS[kind]
    except ValueError as error:
        raise ValueError(f"{name} is {_shown(model)}: {error}") from error


def shipped_network(name: str) -> Path:
    """Return the folder of a pretrained network that comes with the package. ValueError if it is not installed."""
    folder = Path(str(resources.files("pecker_fast") / "assets" / name / "unet"))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not installed: pecker-fast pretrain --preset {name} makes this network")
    return folder


def recorded_options(path: str | os.PathLike) -> dict[str, Any]:
    """Read the options of a run or the configuration of a pipeline; empty if the folder is neither.

    ``path`` is its folder, or that of the network in it. RecordError, a ValueError, if they are damaged.
    """
    for folder in (Path(path), Path(path).parent):
        for file in (folder / "config.json", folder / "model_index.json"):
            try:
                config = read_config(file) if file.is_file() else {}
            except RecordError:
                if folder == Path(path) or Path(path).name == "unet":
                    raise
                # The folder that a network is in need not be that of a run or a pipeline.
                continue
            options = config.get("options", config)
            if isinstance(options, dict) and ("t_init" in options or "eval_sampler" in options):
                record = ManyStepOptions if "eval_sampler" in options else OneStepOptions
                check_object(options, record, f"{file}, the options of its sampler,")
                return options
    return {}


class OneStepOptions(TypedDict, total=False):
    """The recorded option that says how a network is sampled in one step; None if it is not."""

    t_init: COUNT | None


class ManyStepOptions(OneStepOptions):
    """The recorded options that say how a network is sampled in many steps."""

    eval_sampler: Literal["ddim", "ddpm"]
    num_inference_steps: POSITIVE
    eval_guidance_scale: float
    clip_sample: bool


_KINDS: dict[str, Literal["classes", "prompts"]] = {"UNet2DModel": "classes", **dict.fromkeys(ARCHITECTURES, "prompts")}


def _class_model(folder: Path, source: str) -> ClassModel:
    return ClassModel(*load_network(folder), source, recorded_options(folder))


def _loaded_class_model(model: Any, scheduler: Any) -> ClassModel:
    unet = unet_of(model)
    check_class_conditional(unet)
    scheduler = getattr(model, "scheduler", None) if scheduler is None else scheduler
    if scheduler is None:
        raise ValueError("its schedule is not given: expected a pipeline, or a network and its scheduler")
    schedule = (
        scheduler
        if isinstance(scheduler, Parametrisation)
        else schedule_from_config(config_of(scheduler), "its scheduler")
    )
    return ClassModel(copied(unet), schedule.to("cpu"), _memory(model), _pipeline_options(model))


def _is_object(model: Any) -> "TypeIs[nn.Module | DiffusionPipeline]":
    return not isinstance(model, (str, os.PathLike))


def unet_of(model: "nn.Module | DiffusionPipeline") -> nn.Module:
    """Return a network itself, or the U-Net of a pipeline, without wrappers. ValueError if it has none."""
    unet = model if isinstance(model, nn.Module) else getattr(model, "unet", None)
    if not isinstance(unet, nn.Module):
        raise ValueError("it has no U-Net: expected a path, a name, a U-Net or a pipeline of diffusers")
    return unwrap(unet)


def _pipeline_options(model: Any) -> dict[str, Any]:
    """Options of a pipeline in memory, as ``recorded_options`` reads them from a folder."""
    t_init = None if isinstance(model, nn.Module) else model.config.get("t_init")
    return {} if t_init is None else {"t_init": t_init}


def _memory(model: Any) -> str:
    return f"memory:{type(unwrap(model) if isinstance(model, nn.Module) else model).__name__}"


def _shown(model: Any) -> str:
    return f"a {type(model).__name__}" if _is_object(model) else repr(str(model))
