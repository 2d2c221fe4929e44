"""Patches in formats of other programs: one file with the whole network, an adapter of PEFT."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import save_tensors, write_folder, write_json
from ..models import resolve_config
from ..models.ldm_names import ldm_names
from ..patches import Patch, Switched, check_patches, switch_
from .patch_disk import PathLike, check_target, fitting_weights, located


def export_network(
    model: PathLike,
    files: Sequence[PathLike],
    output: PathLike,
    variant: str | None = None,
    *,
    ldm: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the U-Net with patches applied as one safetensors file.

    Parameters
    ----------
    model : path-like
        The base: a folder of diffusers or a safetensors file.
    files : sequence of path-like
        Patch files in the order in which they were made; none for the U-Net as it is.
    output : path-like
        The file, which ends with .safetensors. ``from_single_file`` of diffusers' U-Nets reads it.
    variant : str, optional
        As of ``apply_patch``.
    ldm : bool
        Whether weights have the names of the original Stable Diffusion code, which other front ends read, in place of
        those of diffusers.
    dtype : torch.dtype, optional
        Dtype that the result is rounded to; as it is by default.

    Returns
    -------
    Path
        ``output``.

    Raises
    ------
    ValueError
        As by ``apply_patch``; with ``ldm`` also if the model is a file, or a layer has no original name.
    """
    target = Path(output)
    if target.suffix != ".safetensors":
        raise ValueError(f"output is {str(output)!r}, expected a file that ends with .safetensors")
    check_target(Path(model), target)
    if ldm and located(model).is_file():
        raise ValueError(f"model is {str(model)!r}, expected a folder: the names depend on the U-Net's configuration")
    patches = [Patch.load(file) for file in files]
    weights = fitting_weights(model, patches[0] if patches else None, False, variant)[1]
    state = {name: value.clone() for name, value in weights.items()}
    if patches:
        switch_(state, patches)
    if dtype is not None:
        state = {name: value.to(dtype) for name, value in state.items()}
    if ldm:
        names = ldm_names(state, resolve_config(located(model), name="model"))
        state = {names[name]: value for name, value in state.items()}
    save_tensors(target, state, {"format": "pt"})
    return target


def export_shira(model: PathLike, files: Sequence[PathLike], output: PathLike, variant: str | None = None) -> "Shira":
    """Write the changes of linear layers' weights as a SHiRA adapter, which ``PeftModel.from_pretrained`` reads.

    An adapter adds differences to the base. The sum is rounded, so a weight may differ from the result in its last
    bits; a patch file is exact. Every layer of an adapter has r (inputs + outputs) entries, with one r for all. So it
    is filled up with entries that stay as they are, and layers that are too small for the others' r are left out.

    Parameters
    ----------
    model : path-like
        The base: the folder of a pipeline, a U-Net or a run.
    files : sequence of path-like
        Patch files in the order in which they were made.
    output : path-like
        The folder to write.
    variant : str, optional
        As of ``apply_patch``.

    Returns
    -------
    Shira
        What the adapter has, and what it leaves out.

    Raises
    ------
    ValueError
        As by ``apply_patch``, or if no linear layer changes.
    """
    target, source = Path(output), located(model)
    check_target(source, target)
    if source.is_file():
        raise ValueError(f"model is {str(model)!r}, expected a folder: an adapter needs the U-Net's configuration")
    patches = [Patch.load(file) for file in files]
    before = fitting_weights(model, patches[0] if patches else None, False, variant)[1]
    check_patches(before, patches)
    after = Switched(before, patches)
    # One patch for all of them.
    patch = Patch.between(before, after)
    changed = [name for name in linear_layers(resolve_config(source, name="model")) if patch[f"{name}.weight"].count]
    if not changed:
        raise ValueError("no linear layer changes, and SHiRA adapters hold nothing else")
    rank, layers = choose_rank(
        {name: (patch[f"{name}.weight"].count, before[f"{name}.weight"].shape) for name in changed}
    )
    tensors: dict[str, Tensor] = {}
    entries = exact = 0
    for name in layers:
        weight = f"{name}.weight"
        old, new = (state[weight].reshape(-1).double() for state in (before, after))
        positions = _filled(torch.from_numpy(patch.positions(weight)), len(old), rank * sum(before[weight].shape))
        values = (new - old)[positions].float()
        # -0 leaves every entry as it is, +0 makes +0 of -0.
        values[values == 0] = -0.0
        columns = before[weight].shape[1]
        tensors[f"base_model.model.{name}.shira_weight"] = values
        tensors[f"base_model.model.{name}.shira_indices"] = torch.stack(
            [positions // columns, positions % columns]
        ).int()
        moved = old[positions] != new[positions]
        sums = before[weight].reshape(-1)[positions] + values.to(before[weight].dtype)
        entries += patch[weight].count
        exact += int((sums == after[weight].reshape(-1)[positions])[moved].sum())
    config = {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",
        "target_modules": "|".join(map(re.escape, layers)),
    }
    config |= {"fan_in_fan_out": False, "inference_mode": True, "task_type": None, "base_model_name_or_path": None}

    def write(folder: Path) -> None:
        write_json(folder / "adapter_config.json", config)
        save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})

    write_folder(target, write)
    return Shira(rank, tuple(layers), entries, exact, patch.count)


@dataclass(frozen=True)
class Shira:
    """What a SHiRA adapter has of a patch.

    Parameters
    ----------
    rank : int
        Its r.
    layers : tuple of str
        The linear layers in it.
    entries : int
        Changed entries in it.
    exact : int
        Those of them that the base plus the adapter gives bit for bit; the others are rounded.
    total : int
        Changed entries of the network.
    """

    rank: int
    layers: tuple[str, ...]
    entries: int
    exact: int
    total: int

    def __str__(self) -> str:
        return (
            f"SHiRA adapter of {len(self.layers)} linear layers, r {self.rank}: {self.entries:,d} of {self.total:,d} "
            f"changed entries, {self.exact:,d} of them without rounding; left out: {self.total - self.entries:,d} "
            "entries of other layers, of biases, and of linear layers that are too small for this r"
        )


def linear_layers(config: Mapping[str, Any]) -> list[str]:
    """The names of the linear layers of a U-Net of diffusers, from its configuration."""
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise ValueError(f"the model is a {config.get('_class_name')}, expected a network of diffusers")
    with torch.device("meta"):
        network = kind.from_config(dict(config))
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def choose_rank(layers: Mapping[str, tuple[int, Sequence[int]]]) -> tuple[int, list[str]]:
    """The r of an adapter, and its layers, so that as many changed entries as possible have a place.

    Parameters
    ----------
    layers : mapping
        Name of a layer to its number of changed entries and the shape of its weight.

    Raises
    ------
    ValueError
        If no layer fits any r.
    """

    def fitting(rank: int) -> list[str]:
        return [n for n, (count, shape) in layers.items() if count <= rank * sum(shape) <= math.prod(shape)]

    candidates = sorted({-(-count // sum(shape)) for count, shape in layers.values()})
    rank = max(candidates, key=lambda rank: sum(layers[name][0] for name in fitting(rank)))
    if not fitting(rank):
        raise ValueError("no linear layer fits a SHiRA adapter: too many of their entries change")
    return rank, fitting(rank)


def _filled(positions: Tensor, numel: int, count: int) -> Tensor:
    """``positions`` with the first others, ``count`` in all, in increasing order."""
    free = torch.ones(numel, dtype=torch.bool)
    free[positions] = False
    return torch.cat([positions, free.nonzero().view(-1)[: count - len(positions)]]).sort().values
