"""Reader of delta files, which patches replace: one bit an entry, and the new values of the changed entries."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, int32

from ..hashing import state_hash
from ..ops import num_words, unpack_bits
from .patch import as_bits

FORMAT, VERSION = "pecker_fast.delta", 1


def apply_delta(base: Mapping[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """The result of a delta file.

    Parameters
    ----------
    base : mapping of str to Tensor
        State dict that the file was made from. It is not changed.
    path : path-like
        The file.

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
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["delta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kind, version, expected, result = (metadata[key] for key in ("format", "version", "base", "result"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a delta file: {error}") from error
    if kind != FORMAT or version != VERSION:
        raise ValueError(f"{path} has format {kind!r} version {version!r}, expected {FORMAT!r} {VERSION}")
    if state_hash(base) != expected:
        raise ValueError(f"{path} was made from other weights than this base: the sha256 differ")
    weights = {}
    for name, value in base.items():
        bits = as_bits(value).cpu().contiguous().reshape(-1).clone()
        if f"{name}.mask" in tensors:
            mask, values = tensors[f"{name}.mask"], tensors.get(f"{name}.values")
            fits = mask.dtype == int32 and mask.shape == (num_words(value.numel()),)
            differs = unpack_bits(mask, value.numel()) if fits else None
            if values is None or differs is None or values.dtype != value.dtype or len(values) != int(differs.sum()):
                raise ValueError(f"{path} is damaged: the values of {name} do not fit its mask")
            bits[differs] = as_bits(values)
        weights[name] = bits.view(value.dtype).view(value.shape)
    if state_hash(weights) != result:
        raise ValueError(f"{path} is damaged: the result does not match the recorded sha256")
    return weights
