"""Tables on the device that let one launch work on any number of tensors: their addresses, and their chunks."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

_CAPACITY = 64
_cache: OrderedDict[Hashable, Tensor] = OrderedDict()
_chunk_counts: dict[Hashable, int] = {}


def _cached(key: Hashable, values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``values`` on the device; sent there once and kept for as long as it is in use.

    Keys hold the values themselves, so a table can never be out of date. From pinned memory the copy does not wait.
    """
    table = _cache.get(key)
    if table is None:
        table = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
        if device.type == "cuda":
            table = table.to(device, non_blocking=True)
        _cache[key] = table
        if len(_cache) > _CAPACITY:
            oldest, _ = _cache.popitem(last=False)
            _chunk_counts.pop(oldest, None)
    else:
        _cache.move_to_end(key)
    return table


def addresses(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """int64 [n]: where each tensor's data is; 0 for None."""
    pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    return _cached(("addresses", device, pointers), pointers, torch.int64, device)


def numbers(values: Sequence[int | float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Any numbers as a tensor on the device."""
    values = tuple(values)
    return _cached(("numbers", device, dtype, values), values, dtype, device)


class Chunks:
    """The entries of several tensors cut into chunks of ``block``; one program takes one chunk.

    ``table`` is int64 [chunks, 4]: tensor, first entry in the tensor, entries of the tensor, number among all chunks.
    ``keep`` leaves out tensors whose flag is false; the numbers still count their chunks.
    """

    def __init__(self, numels: Sequence[int], block: int, device: torch.device, keep: Sequence[bool] | None = None):
        self.total = sum(-(-numel // block) for numel in numels)
        key = ("chunks", device, block, tuple(numels), None if keep is None else tuple(keep))
        table = _cache.get(key)
        if table is None:
            rows, number = [], 0
            for i, numel in enumerate(numels):
                starts = range(0, numel, block)
                if keep is None or keep[i]:
                    rows += [(i, start, numel, number + j) for j, start in enumerate(starts)]
                number += len(starts)
            table = _cached(key, rows or [(0, 0, 0, 0)], torch.int64, device)
            self.count = len(rows)
            _chunk_counts[key] = self.count
        else:
            _cache.move_to_end(key)
            self.count = _chunk_counts[key]
        self.table = table
