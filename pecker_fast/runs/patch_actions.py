"""The actions of ``pecker-fast patch``: paths in, text to read out."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from ..patches import Patch
from .patch_disk import switch_on_disk
from .patch_exports import export_network, export_shira
from .patches import LICENSE, difference, make_patch, verify_patch


def make(
    models: tuple[str, ...],
    output: str,
    dtype: Literal["base", "result"] | None = None,
    license: str = LICENSE,
    variant: str | None = None,
) -> str:
    """Write what a run changed as a patch file. Whoever has the file and the result can bring back what was forgotten.

    Parameters
    ----------
    models : tuple of str
        RUN: the folder of a run; or BASE RESULT: two networks, each the folder of a pipeline, a U-Net or a run, a
        safetensors file, a preset or a name on the hub. RESULT may also be a delta file of an earlier version.
    output : str
        The file to write, which ends with .safetensors and does not exist yet.
    dtype : {"base", "result"}, optional
        If the two have different dtypes: convert the other one to that of the base or of the result.
    license : str
        The licence under which the patch may be used.
    variant : str, optional
        Variant of the base's weights, such as fp16. Default: the plain one.
    """
    _check_number("models", models, (1, 2), "RUN or BASE RESULT")
    patch = make_patch(*models, output=output, dtype=dtype, license=license, variant=variant)
    return f"{_share(patch)}, {Path(output).stat().st_size:,d} bytes: {output}"


def inspect(file: str, json_output: bool = False) -> str:
    """Show the metadata, hashes and densities of a patch file, and check that it is whole.

    Parameters
    ----------
    file : str
        The patch file.
    json_output : bool
        Print JSON.
    """
    patch, size = Patch.load(file), Path(file).stat().st_size
    if json_output:
        return json.dumps(_as_json(patch, size), indent=1)
    lines = [f"{file}: {_share(patch)}, {size:,d} bytes", f"base    {patch.base}", f"result  {patch.result}"]
    lines += [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in _known(patch)]
    return "\n".join([*lines, "", patch.mask().summary("changed")])


def verify(file: str, model: str | None = None, variant: str | None = None) -> str:
    """Check that a patch file is whole, and whether it can be applied to a model or reverted. Nothing is changed.

    Parameters
    ----------
    file : str
        The patch file.
    model : str, optional
        Folder of a pipeline, a U-Net or a run, or a safetensors file. Default: the file alone is checked.
    variant : str, optional
        Variant of the model's weights, such as fp16. Default: the one that fits.
    """
    if model is None:
        return f"{file} is whole: {_share(Patch.load(file))}; whether it fits a model: --model"
    end = verify_patch(file, model, variant=variant)
    return f"{model} is the {end} of {file}: the patch can be {'applied' if end == 'base' else 'reverted'}, bit for bit"


def apply(
    files: tuple[str, ...],
    model: str,
    output: str | None = None,
    in_place: bool = False,
    variant: str | None = None,
) -> str:
    """Apply patch files to a model on disk, one after the other. Hashes are checked before anything is written.

    Parameters
    ----------
    files : tuple of str
        Patch files, in the order in which they were made.
    model : str
        Folder of a pipeline, a U-Net or a run, or a safetensors file.
    output : str, optional
        The folder or file to write. All that is not weights of the U-Net is copied as it is.
    in_place : bool
        Change the model's own files instead.
    variant : str, optional
        Variant of the weights, such as fp16. Default: the one that fits the patches.
    """
    return _switched(files, model, False, output, in_place, variant)


def revert(
    files: tuple[str, ...],
    model: str,
    output: str | None = None,
    in_place: bool = False,
    variant: str | None = None,
) -> str:
    """Revert patch files on a model on disk, the last one first. Hashes are checked before anything is written.

    Parameters
    ----------
    files : tuple of str
        Patch files, the one that was applied last first.
    model : str
        Folder of a pipeline, a U-Net or a run, or a safetensors file.
    output : str, optional
        The folder or file to write. All that is not weights of the U-Net is copied as it is.
    in_place : bool
        Change the model's own files instead.
    variant : str, optional
        Variant of the weights, such as fp16. Default: the one that fits the patches.
    """
    return _switched(files, model, True, output, in_place, variant)


def diff(items: tuple[str, ...], variant: str | None = None) -> str:
    """Compare two networks, by the share of entries that differ, or two patch files, by how their positions overlap.

    Parameters
    ----------
    items : tuple of str
        Two networks, as for make, or two patch files.
    variant : str, optional
        Variant of the first network's weights, such as fp16. Default: the plain one.
    """
    _check_number("items", items, (2,), "two networks or two patch files")
    masks = difference(*items, variant=variant)
    if len(masks) == 1:
        return masks[0].summary("changed")
    first, second = masks
    both = first & second
    random = first.density * second.density * first.numel
    return (
        f"{both.summary('in both')}\n"
        f"{items[0]}: {first.count} entries, {items[1]}: {second.count}\n"
        f"intersection over union {first.iou(second):.3f}; two random choices of these sizes share {random:.0f} entries"
    )


def export(
    model: str,
    output: str,
    files: tuple[str, ...] = (),
    format: Literal["safetensors", "ldm", "shira"] = "safetensors",
    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same",
    variant: str | None = None,
) -> str:
    """Write a model with patches applied in a format for other programs.

    Parameters
    ----------
    model : str
        The base: folder of a pipeline, a U-Net or a run, or (for safetensors) a safetensors file.
    output : str
        The file to write; for shira the folder.
    files : tuple of str
        Patch files, in the order in which they were made. None: the model as it is, such as a run's result.
    format : {"safetensors", "ldm", "shira"}
        safetensors: the whole U-Net in one file, with the names of diffusers. ldm: the same with the names of the
        original Stable Diffusion code, as other front ends read it. shira: an adapter for PEFT, of the weights of
        linear layers alone.
    dtype : {"same", "float32", "float16", "bfloat16"}
        Dtype of the file, for safetensors and ldm.
    variant : str, optional
        Variant of the weights, such as fp16. Default: the one that fits the patches.
    """
    if format == "shira":
        if dtype != "same":
            raise ValueError(f"dtype is {dtype!r}, but format is 'shira', which has its own: expected same")
        return f"{export_shira(model, files, output, variant)}: {output}"
    rounded = None if dtype == "same" else getattr(torch, dtype)
    path = export_network(model, files, output, variant, ldm=format == "ldm", dtype=rounded)
    return f"the U-Net with the names of {'diffusers' if format == 'safetensors' else 'the original code'}: {path}"


def _switched(files: tuple[str, ...], model: str, revert: bool, *options: Any) -> str:
    done = switch_on_disk(model, files, revert, *options)
    notes = [f"note: {note}" for note in done.notes]
    return "\n".join([f"{'reverted' if revert else 'applied'}, sha256 verified: {done.path}", *notes])


def _share(patch: Patch) -> str:
    return f"{patch.count:,d} of {patch.numel:,d} entries changed ({patch.density:.2%})"


def _known(patch: Patch) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in patch.metadata.items() if value is not None]


def _as_json(patch: Patch, size: int) -> dict[str, Any]:
    return {
        "bytes": size,
        "numel": patch.numel,
        "changed": patch.count,
        "base": patch.base,
        "result": patch.result,
        **patch.metadata,
        "tensors": {t.name: {"dtype": t.dtype, "shape": t.shape, "changed": t.count} for t in patch.tensors},
    }


def _check_number(name: str, values: tuple[str, ...], numbers: tuple[int, ...], expected: str) -> None:
    if len(values) not in numbers:
        raise ValueError(f"{name} is {', '.join(values)}, expected {expected}")
