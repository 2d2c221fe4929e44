"""Files with the weights that a run changed: one bit an entry, and the new values of the changed entries.

Meant for methods that leave most weights exactly as they were. Applying a file to its base reproduces the result bit
for bit; the sha256 of both is checked.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .files import save_tensors
from .hashing import state_hash
from .ops import num_words, pack_bits, unpack_bits

FORMAT, VERSION = "pecker_fast.delta", 1
# Integers of the same size, to compare entries bit for bit: NaN equals NaN, and -0 differs from 0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class DeltaSummary:
    """Number of entries, number of changed entries, and size of the file in bytes."""

    numel: int
    changed: int
    bytes: int

    @property
    def density(self) -> float:
        return self.changed / max(1, self.numel)


def _as_bits(value: Tensor) -> Tensor:
    """The entries as integers of the same size, in row-major order, on the CPU."""
    return value.detach().cpu().contiguous().reshape(-1).view(_BITS[value.element_size()])


def save_delta(base: Mapping[str, Tensor], changed: Mapping[str, Tensor], path: str | os.PathLike) -> DeltaSummary:
    """Writes the entries of ``changed`` that differ from ``base``.

    Parameters
    ----------
    base, changed : mapping of str to Tensor
        State dicts with the same names, shapes and dtypes.
    path : path-like
        File to write, all or nothing.

    Returns
    -------
    DeltaSummary

    Raises
    ------
    ValueError
        If the two state dicts are not of one architecture.
    """
    _check_alike(base, changed)
    tensors: dict[str, Tensor] = {}
    numel = count = 0
    for name, value in changed.items():
        before, after = _as_bits(base[name]), _as_bits(value)
        differs = before != after
        number = int(differs.sum())
        numel, count = numel + after.numel(), count + number
        if number:
            tensors[f"{name}.mask"] = pack_bits(differs)
            tensors[f"{name}.values"] = value.detach().cpu().contiguous().reshape(-1)[differs]
    metadata = {"format": FORMAT, "version": VERSION, "base": state_hash(base), "result": state_hash(changed)}
    save_tensors(path, tensors, {"delta": json.dumps(metadata)})
    return DeltaSummary(numel, count, Path(path).stat().st_size)


def apply_delta(base: Mapping[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """The changed weights.

    Parameters
    ----------
    base : mapping of str to Tensor
        State dict that the file was made from. It is not modified.
    path : path-like
        File written by ``save_delta``.

    Returns
    -------
    dict of str to Tensor
        The result's state dict, on the CPU.

    Raises
    ------
    ValueError
        If the file is no delta or is damaged, or if ``base`` or the result does not match the recorded sha256.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["delta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kind, version, expected, result = (metadata[key] for key in ("format", "version", "base", "result"))
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a delta file: {error}") from error
    if kind != FORMAT or version != VERSION:
        raise ValueError(f"{path} has format {kind!r} version {version!r}, expected {FORMAT!r} {VERSION}")
    if state_hash(base) != expected:
        raise ValueError(f"{path} was made from other weights than this base: the sha256 differ")
    weights = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in base.items()}
    for name, value in weights.items():
        if f"{name}.mask" not in tensors:
            continue
        mask, values = tensors[f"{name}.mask"], tensors.get(f"{name}.values")
        differs = _unpacked(mask, value.numel())
        if values is None or differs is None or values.dtype != value.dtype or len(values) != int(differs.sum()):
            raise ValueError(f"{path} is damaged: the values of {name} do not fit its mask")
        value.view(-1)[differs] = values
    if state_hash(weights) != result:
        raise ValueError(f"{path} is damaged: the result does not match the recorded sha256")
    return weights


def _unpacked(words: Tensor, numel: int) -> Tensor | None:
    fits = words.dtype == torch.int32 and words.shape == (num_words(numel),)
    return unpack_bits(words, numel) if fits else None


def _check_alike(base: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
    if base.keys() != changed.keys():
        names = sorted(base.keys() ^ changed.keys())
        raise ValueError(f"base and changed differ in {len(names)} names, such as {names[0]}")
    for name, value in changed.items():
        if value.shape != base[name].shape or value.dtype != base[name].dtype:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and {value.dtype}, "
                f"in the base {tuple(base[name].shape)} and {base[name].dtype}"
            )
