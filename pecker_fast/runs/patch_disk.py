"""Patches on models on disk: applied or reverted in place, or as a copy of the model's folder."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike as _PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_folder
from ..hashing import state_hash
from ..models import WeightFiles, find_weight_files, other_weights, recorded_options, shipped_network
from ..patches import Patch, Switched, check_patches
from ..records import RecordError, read_object
from .arguments import check_output
from .distilled import GENERATOR, SHIPPED
from .presets import CLASS_PRESETS

PathLike = str | _PathLike


@dataclass(frozen=True)
class Switching:
    """Patches that were applied or reverted on disk: where, and what to know about it."""

    path: Path
    notes: tuple[str, ...]


def switch_on_disk(
    model: PathLike,
    files: Sequence[PathLike],
    revert: bool = False,
    output: PathLike | None = None,
    in_place: bool = False,
    variant: str | None = None,
) -> Switching:
    """``apply_patch`` or ``revert_patch`` on disk, with its warnings as text."""
    patches = [Patch.load(file) for file in files]
    source = located(model)
    if not source.exists():
        raise ValueError(f"model is {str(model)!r}, expected a folder or a safetensors file on disk")
    if in_place == (output is not None):
        raise ValueError("expected one of output, a new folder or file, and in_place")
    if in_place and source != Path(model):
        raise ValueError(f"model is {str(model)!r}, which comes with the package: give an output")
    is_run = _has_records(source)
    if in_place and is_run:
        raise ValueError(
            f"model is {str(model)!r}, the folder of a run, whose records would no longer be true: give an output"
        )
    target = source if output is None else Path(output)
    if output is not None:
        check_target(source, target)
        if source.is_file() and target.suffix != source.suffix:
            raise ValueError(f"output is {str(output)!r}, expected a file that ends with {source.suffix}, as the model")
    files_there, state = fitting_weights(source, patches[0] if patches else None, revert, variant)
    check_patches(state, patches, revert)
    notes = [f"{file.name} is left as it is: it is no part of these weights" for file in other_weights(files_there)]
    names = sorted({tensor.name for patch in patches for tensor in patch.changed})
    widened = state is not files_there.weights
    if widened:
        dtypes = sorted({tensor.dtype for tensor in patches[0].tensors})
        if in_place or source.is_file():
            raise ValueError(
                f"model is {str(model)!r}, in another dtype than the patch ({', '.join(dtypes)}): give a new folder"
            )
        notes.append(f"the weights are written in {', '.join(dtypes)}, the dtype of the patch")

    def edit(name: str, bits: Any) -> None:
        for patch in patches:
            patch.switch_array(name, bits)

    def write(folder: Path) -> None:
        replaced, parts = set(files_there.files), _parts(source) if is_run else None

        def left_out(place: str, content: list[str]) -> set[str]:
            outside = parts is not None and Path(place) == source
            return {name for name in content if Path(place) / name in replaced or (outside and name not in parts)}

        shutil.copytree(source, folder, ignore=left_out, dirs_exist_ok=True)
        place = folder / files_there.folder.relative_to(source)
        if widened:
            files_there.save(Switched(state, patches), place)
        else:
            files_there.copy_changed(names, edit, place)

    if in_place:
        files_there.change(names, edit)
    elif source.is_file():
        files_there.save_changed(names, edit, target)
    else:
        write_folder(target, write)
    if not revert:
        notes += sampling_notes(patches[-1], recorded_options(target).get("t_init"))
    return Switching(target, tuple(notes))


def located(model: PathLike) -> Path:
    """The path of a model, which is also known by name if it comes with the package.

    Parameters
    ----------
    model : path-like
        A path; or what patches record of their base: "shipped:digits" (or the preset's name alone) is the pretrained
        network of a preset, "shipped:digits/distilled" its one-step generator.
    """
    text = str(model)
    name, part = text.removeprefix(SHIPPED), ""
    if text.startswith(SHIPPED):
        name, _, part = name.partition("/")
    network = CLASS_PRESETS[name].network if name in CLASS_PRESETS else None
    if Path(model).exists() or network is None or part not in ("", GENERATOR):
        return Path(model)
    return shipped_network(network).with_name(GENERATOR) if part else shipped_network(network)


def check_target(source: Path, target: Path) -> None:
    """Raise ValueError unless the copy of a model on disk can be written to ``target``."""
    if target.exists():
        raise ValueError(f"output is {str(target)!r}, which exists already")
    check_output(target)
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise ValueError(f"output is {str(target)!r}, expected a place outside of the model's folder")


def sampling_notes(patch: Patch, recorded: int | None) -> list[str]:
    """What to know if a model is now to be sampled in another way than it says itself."""
    sampler = patch.metadata.get("sampler")
    wanted = sampler.get("t_init") if isinstance(sampler, dict) else None
    if wanted == recorded:
        return []
    if wanted is None:
        return [f"the model says t_init {recorded}, the patch does not say that its result draws in one step"]
    has = "does not say so" if recorded is None else f"says t_init {recorded}"
    return [f"the result draws in one step at t_init {wanted}, the model {has}: sample it with that t_init"]


def fitting_weights(
    model: PathLike, patch: Patch | None, revert: bool | None, variant: str | None
) -> tuple[WeightFiles, Mapping[str, Tensor]]:
    """The weights on disk that a patch is for, or the first ones if none are, in the dtype that the patch is for.

    A run reads float16 and bfloat16 as float32, which is exact; so a patch of float32 fits them, too.
    """
    choices = [(files, _widened(files.weights, patch)) for files in find_weight_files(located(model), variant)]
    if patch is None or len(choices) == 1:
        return choices[0]
    fits = [
        choice for choice in choices if all(t.name in choice[1] and t.fits(choice[1][t.name]) for t in patch.tensors)
    ]
    if len(fits) > 1:
        wanted = {patch.base, patch.result} if revert is None else {patch.result if revert else patch.base}
        fits = [choice for choice in fits if state_hash(choice[1]) in wanted] or fits
    return (fits or choices)[0]


def _widened(weights: Mapping[str, Tensor], patch: Patch | None) -> Mapping[str, Tensor]:
    """``weights`` as float32 if they are of smaller floats and the patch is of float32; otherwise ``weights``."""
    small = {name for name, value in weights.items() if value.dtype in (torch.float16, torch.bfloat16)}
    if patch is None or not small or any(t.dtype != "float32" for t in patch.tensors if t.name in small):
        return weights
    return {name: value.float() if name in small else value for name, value in weights.items()}


def _has_records(folder: Path) -> bool:
    """Whether a folder is that of a run, whose config.json is that of no network."""
    try:
        return "_class_name" not in read_object(folder / "config.json")
    except RecordError:
        return False


def _parts(run: Path) -> set[str]:
    """What a run's folder has of its pipeline. Its records do not describe the network that a patch makes of it."""
    index = run / "model_index.json"
    parts = read_object(index) if index.is_file() else {"unet": None}
    return {index.name, "pipeline.py", *parts}
