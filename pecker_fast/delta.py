"""What a run changed in a network's weights, as a file: a bit for each entry, and the values of those that changed.

For methods that leave most weights exactly as they were. Applied to the same base it gives the same result, bit for
bit; both are checked by sha256.
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
# Entries of equal size, to be compared bit for bit: NaN is NaN, -0 is not 0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class DeltaSummary:
    """Entries in all and changed, and bytes of the file."""

    numel: int
    changed: int
    bytes: int

    @property
    def density(self) -> float:
        return self.changed / max(1, self.numel)


def _as_bits(value: Tensor) -> Tensor:
    """The entries as integers of the same size, row-major, on the CPU."""
    return value.detach().cpu().contiguous().reshape(-1).view(_BITS[value.element_size()])


def save_delta(base: Mapping[str, Tensor], changed: Mapping[str, Tensor], path: str | os.PathLike) -> DeltaSummary:
    """Writes what ``changed`` has that ``base`` has not.

    Parameters
    ----------
    base, changed: weights by name, of equal names, shapes and dtypes (as ``state_dict`` gives them).
    path: the file; written under a temporary name and renamed.

    Raises ValueError where they are not of one architecture.
    """
    _check_alike(base, changed)
    tensors: dict[str, Tensor] = {}
    numel = count = 0
    for name, value in changed.items():
        before, after = _as_bits(base[name]), _as_bits(value)
        differs = before != after
        found = int(differs.sum())
        numel, count = numel + after.numel(), count + found
        if found:
            tensors[f"{name}.mask"] = pack_bits(differs)
            tensors[f"{name}.values"] = value.detach().cpu().contiguous().reshape(-1)[differs]
    said = {"format": FORMAT, "version": VERSION, "base": state_hash(base), "result": state_hash(changed)}
    save_tensors(path, tensors, {"delta": json.dumps(said)})
    return DeltaSummary(numel, count, Path(path).stat().st_size)


def apply_delta(base: Mapping[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """The changed weights, by name, on the CPU; ``base`` is left as it is.

    Raises ValueError where the file is no delta or damaged, ``base`` is not what it was made of, or the result is not
    what it was made for.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})["delta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kind, version, expected, result = (said[key] for key in ("format", "version", "base", "result"))
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no delta: {error}") from error
    if kind != FORMAT or version != VERSION:
        raise ValueError(f"{path} has format {kind!r} version {version!r}, expected {FORMAT!r} {VERSION}")
    if state_hash(base) != expected:
        raise ValueError(f"{path} is of other weights than the base: their sha256 differ")
    made = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in base.items()}
    for name, value in made.items():
        if f"{name}.mask" not in tensors:
            continue
        mask, values = tensors[f"{name}.mask"], tensors.get(f"{name}.values")
        differs = _unpacked(mask, value.numel())
        if values is None or differs is None or values.dtype != value.dtype or len(values) != int(differs.sum()):
            raise ValueError(f"{path} is damaged: its values of {name} do not fit its mask")
        value.view(-1)[differs] = values
    if state_hash(made) != result:
        raise ValueError(f"{path} is damaged: the result is not what it was made for")
    return made


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
