"""Patch files of runs and models: made, inspected, verified, applied and reverted, on disk and in memory."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from torch import Tensor, nn

from ..hashing import state_hash
from ..mask import SaliencyMask
from ..models import (
    find_weight_files,
    is_hub_file,
    recorded_options,
    resolve,
    resolve_text,
    resolve_text_unet,
    shipped_network,
    unet_of,
)
from ..patches import Patch, apply_delta, check_patches, file_kind, patch_mask, switch_
from .arguments import check_output
from .distilled import GENERATOR, SHIPPED, Distilled
from .folder import run_config
from .patch_disk import PathLike, fitting_weights, located, sampling_notes, switch_on_disk
from .presets import PRESETS, class_preset
from .run import Run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# A path or a name; or weights in memory.
Weights = Union[PathLike, Mapping[str, Tensor], nn.Module, "DiffusionPipeline"]
M = TypeVar("M", bound=Run | Weights)

LICENSE = "that of the base model"
# Figures of a run that its patch carries.
METRICS = (
    *("ua", "retain_accuracy", "frechet_distance", "frechet_real_split", "diversity", "cover_frechet_distance"),
    *("parameters_changed", "drift_norm", "iterations", "images"),
)


def make_patch(
    base: Run | Weights,
    result: Run | Weights | None = None,
    *,
    output: PathLike,
    dtype: Literal["base", "result"] | None = None,
    license: str = LICENSE,
    variant: str | None = None,
) -> Patch:
    """Write what a run changed as a patch file.

    Whoever has the patch of an unlearning run and its result can revert it: the file brings back what was forgotten.

    Parameters
    ----------
    base : Run, path, name, state dict, nn.Module or DiffusionPipeline
        What to start from; or, without ``result``, a run: its base is the generator that it started from
        (distilled or initial_generator), otherwise its pretrained network.
    result : as ``base``, optional
        The changed network; also a delta file of an earlier version.
    output : path-like
        The file to write, which ends with .safetensors and does not exist yet.
    dtype : {"base", "result"}, optional
        If the two have different dtypes: convert the other one to that of the base or of the result. Default: for a run
        that of the result, as which it read its base; otherwise such networks are refused.
    license : str
        The licence under which the patch may be used.
    variant : str, optional
        Variant of the base's weights, such as "fp16".

    Returns
    -------
    Patch
        What was written.

    Raises
    ------
    ValueError
        If a model cannot be found or is not the one that the run started from, the two are of different architectures
        or dtypes, or ``output`` exists.

    Examples
    --------
    >>> pf.make_patch("runs/digits-patch-seed0", output="forget-0.safetensors").density
    """
    if dtype not in (None, "base", "result"):
        raise ValueError(f"dtype is {dtype!r}, expected base or result")
    check_output(output, ".safetensors")
    if Path(output).exists():
        raise ValueError(f"output is {str(output)!r}, which exists already")
    expected, label = None, None
    if result is None:
        result = base if isinstance(base, Run) else Run(str(_path(base, "run")))
        if not result.has_ended:
            raise ValueError(f"{result.folder} has not ended: continue it with --resume_from_checkpoint latest")
        base, label, expected = _base_of(result)
        # A run computes with float32 copies, whatever the dtype of its base's files.
        dtype = dtype or "result"
    else:
        label = _label(base)
    before = _state(base, "base", variant)
    if expected is not None and state_hash(_as_float32(before)) != expected:
        shown = label if isinstance(base, Mapping) else str(base)
        raise ValueError(f"base is {shown!r}, whose weights are not those that the run started from: sha256 differ")
    if isinstance(result, (str, os.PathLike)) and file_kind(result) == "delta":
        after: Mapping[str, Tensor] = apply_delta(before, result)
    else:
        after = _state(result, "result")
    if dtype is None and expected is not None:
        # A run starts from its base in the result's dtype.
        dtype = "result"
    if dtype == "base":
        after = _converted(after, before)
    elif dtype == "result":
        before = _converted(before, after)
    patch = Patch.between(before, after, {**_described(result), "base_model": label, "license": license})
    patch.save(output)
    return patch


def inspect_patch(file: PathLike) -> Patch:
    """Read a patch file and check that it is whole.

    Parameters
    ----------
    file : path-like
        The file.

    Returns
    -------
    Patch
        Its metadata, hashes, tensors and density; ``patch.mask()`` has its positions.

    Raises
    ------
    ValueError
        If it is not a patch file, or is damaged.

    Examples
    --------
    >>> patch = pf.inspect_patch("forget-0.safetensors")
    >>> patch.density, patch.metadata["request"], patch.metadata["sampler"]
    """
    return Patch.load(file)


def verify_patch(file: PathLike, model: Run | Weights, *, variant: str | None = None) -> Literal["base", "result"]:
    """Check a patch file, and that a model is its base or its result. Nothing is changed.

    Parameters
    ----------
    file : path-like
        The patch file.
    model : path, Run, state dict, nn.Module or DiffusionPipeline
        The model.
    variant : str, optional
        Variant of the model's weights. Default: the one that fits the patch.

    Returns
    -------
    {"base", "result"}
        "base": the patch can be applied; "result": it can be reverted. Both were tried, bit for bit.

    Raises
    ------
    ValueError
        If the file is damaged, or the model is neither.
    """
    patch = Patch.load(file)
    if isinstance(model, Run):
        model = model.folder
    if isinstance(model, (str, os.PathLike)) and located(model).exists():
        state = fitting_weights(model, patch, None, variant)[1]
    else:
        state = _state(model, "model", variant)
    own = {tensor.name: state[tensor.name] for tensor in patch.tensors if tensor.name in state}
    revert = state_hash(own) == patch.result != patch.base
    check_patches(state, [patch], revert)
    return "result" if revert else "base"


def apply_patch(
    model: M, *files: PathLike, output: PathLike | None = None, in_place: bool = False, variant: str | None = None
) -> M | Path:
    """Apply patch files to a model, one after the other.

    The sha256 of the weights before and after each patch are checked before anything is written. All weights are
    changed, or none.

    Parameters
    ----------
    model : path, Run, state dict, nn.Module or DiffusionPipeline
        A folder of diffusers (pipeline, U-Net or run) or a safetensors file on disk, as is a run; or weights in memory,
        which are changed in place on their devices.
    *files : path-like
        Patch files in the order in which they were made.
    output : path-like, optional
        For a model on disk: the new folder or file. All that is not weights of the U-Net is copied as it is.
    in_place : bool
        For a model on disk: change its files.
    variant : str, optional
        Variant of the weights on disk, such as "fp16". Default: the one that fits the patches.

    Returns
    -------
    Path, or as ``model``
        ``output``; or the model that was changed.

    Raises
    ------
    ValueError
        If a file is damaged, the model is not its base, or ``output`` exists.

    Warns
    -----
    UserWarning
        If other files of weights stay as they are, or the model is now sampled in another way.

    Examples
    --------
    >>> pf.apply_patch(pipe, "forget-0.safetensors")
    >>> pf.apply_patch("model", "forget-0.safetensors", "forget-3.safetensors", output="model-forgot")
    """
    return _switch(model, files, False, output, in_place, variant)


def revert_patch(
    model: M, *files: PathLike, output: PathLike | None = None, in_place: bool = False, variant: str | None = None
) -> M | Path:
    """Revert patch files, the last one first: the model is then its base again, bit for bit.

    Parameters
    ----------
    model, output, in_place, variant
        As of ``apply_patch``.
    *files : path-like
        Patch files, the one that was applied last first.

    Returns
    -------
    Path, or as ``model``
        As by ``apply_patch``.

    Raises
    ------
    ValueError
        If a file is damaged, the model is not its result, or ``output`` exists.
    """
    return _switch(model, files, True, output, in_place, variant)


def difference(first: PathLike, second: PathLike, variant: str | None = None) -> tuple[SaliencyMask, ...]:
    """The entries in which two networks differ, or those that each of two patches changes.

    Parameters
    ----------
    first, second : path-like
        Two networks as for ``make_patch``, or two patch files.
    variant : str, optional
        Variant of the first network's weights.

    Returns
    -------
    tuple of SaliencyMask
        One of two networks, two of two patches.

    Raises
    ------
    ValueError
        If the two are of different kinds, architectures or dtypes, or cannot be read.
    """
    kinds = {file_kind(path) for path in (first, second)}
    if kinds == {"patch"}:
        return patch_mask(first), patch_mask(second)
    if kinds != {None}:
        raise ValueError(f"{first} and {second} are of different kinds, expected two networks or two patch files")
    return (Patch.between(_state(first, "the first", variant), _state(second, "the second")).mask(),)


# ---- models


def _on_disk(model: Any) -> bool:
    return isinstance(model, (str, os.PathLike)) and Path(model).exists()


def _path(model: Any, name: str) -> PathLike:
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"result is not given, and {name} is a {type(model).__name__}, expected the folder of a run")
    return model


def _state(model: Run | Weights, name: str, variant: str | None = None) -> Mapping[str, Tensor]:
    """The weights of a model, in their dtype if they are on disk as safetensors or in memory."""
    if isinstance(model, Run):
        model = model.folder
    if isinstance(model, Mapping):
        return model
    if not isinstance(model, (str, os.PathLike)):
        try:
            return unet_of(model).state_dict()
        except ValueError as error:
            raise ValueError(f"{name} is a {type(model).__name__}: {error}") from error
    path = located(model)
    if path.is_dir() or path.suffix == ".safetensors":
        return find_weight_files(path, variant, name=name)[0].weights
    # A checkpoint of public code, or a name on the hub.
    try:
        return resolve(model, name=name).network.state_dict()
    except ValueError:
        if path.exists():
            raise
    return resolve_text_unet(model, name=name).state_dict()


def _base_of(run: Run) -> tuple[Weights, str, str | None]:
    """What a run started from: where it is, a name to record, and its sha256 in float32 if that is known."""
    config = run.config
    if config.get("distilled") is not None:
        distilled = Distilled.read(config["distilled"])
        name = f"{distilled.name}/{GENERATOR}" if distilled.name.startswith(SHIPPED) else distilled.folder.name
        return distilled.networks["initial_generator"], name, config.get("initial_generator_sha256")
    initial = config.get("initial_generator")
    expected = config.get("pretrained_sha256" if initial is None else "initial_generator_sha256")
    source = config.get("pretrained_model_name_or_path") if initial is None else initial
    if initial is not None and (Path(initial).is_file() or is_hub_file(initial)) and "prompts" in config:
        parts = resolve_text(config["pretrained_model_name_or_path"]).parts
        unet = resolve_text_unet(initial, parts=parts, name="initial_generator")
        return unet.state_dict(), Path(initial).name if Path(initial).exists() else initial, expected
    if source is None:
        return _shipped(config["preset"]), f"shipped:{config['preset']}", expected
    path = Path(source)
    if not path.exists() and (path.is_absolute() or len(path.parts) != 2):
        raise ValueError(f"the base of {run.folder} was {source!r}, which is not there: give BASE and RESULT")
    # The folders of whoever made it are not for whoever gets it.
    return source, path.name if path.exists() else source, expected


def _shipped(preset: str) -> Path:
    """The network of a preset. ValueError if it comes with none."""
    name = class_preset(preset).network
    if name is None:
        raise ValueError(f"no network of the preset {preset} comes with the package")
    return shipped_network(name)


def _label(base: Any) -> str | None:
    """The name of a preset or of a model on the hub, to record; None for anything else."""
    if not isinstance(base, str) or Path(base).exists():
        return None
    return f"shipped:{base}" if base in PRESETS else base


def _described(result: Any) -> dict[str, Any]:
    """What is known of the run that made a result, or of how it is sampled."""
    if isinstance(result, Run):
        result = result.folder
    if not _on_disk(result):
        t_init = None if isinstance(result, (Mapping, str, os.PathLike)) else _t_init(result)
        return {} if t_init is None else {"sampler": {"kind": "one_step", "t_init": t_init}}
    config = run_config(Path(result))
    t_init = recorded_options(result).get("t_init")
    if not config:
        return {} if t_init is None else {"sampler": {"kind": "one_step", "t_init": t_init}}
    run = Run(result)
    metrics = run.metrics if run.has_ended else {}
    names = ("concept", "cover") if "prompts" in config else ("forget_classes", "cover_class")
    sampler = {"kind": metrics.get("sampler"), "t_init": t_init, "steps": metrics.get("sampling_steps")}
    return {
        "request": {name: config[name] for name in names if name in config},
        **{name: config[name] for name in ("method", "preset", "seed") if name in config},
        "sampler": {name: value for name, value in sampler.items() if value is not None},
        "metrics": {name: metrics[name] for name in METRICS if metrics.get(name) is not None},
    }


def _t_init(model: Any) -> int | None:
    config = {} if isinstance(model, nn.Module) else model.config
    return config.get("t_init")


def _as_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _converted(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(like[name].dtype) if name in like else value for name, value in state.items()}


# ---- applying


def _switch(
    model: Any, files: Sequence[PathLike], revert: bool, output: PathLike | None, in_place: bool, variant: str | None
) -> Any:
    if isinstance(model, Run):
        # Its files: the weights in memory would be a copy of them.
        model = model.folder
    if isinstance(model, (str, os.PathLike)):
        done = switch_on_disk(model, files, revert, output, in_place, variant)
        for note in done.notes:
            warnings.warn(note, stacklevel=3)
        return done.path
    if output is not None or variant is not None:
        raise ValueError("output and variant are for models on disk, the model is in memory and is changed itself")
    patches = [Patch.load(file) for file in files]
    switch_(_state(model, "model"), patches, revert)
    if not revert and not isinstance(model, (Mapping, nn.Module)):
        for note in sampling_notes(patches[-1], _t_init(model)):
            warnings.warn(note, stacklevel=3)
    return model
