"""Device tables that let one launch serve any number of tensors: addresses, sizes, and the chunks to work on.

Every table is cached by the values it holds, so a steady training loop uploads nothing, and one whose gradients are
allocated anew uploads their addresses only: one asynchronous copy from pinned memory of 8 bytes a tensor.

CUDA graphs: a table that a captured call uses must outlive every replay, so it lives as long as the process. It is best
uploaded before the capture, by one ordinary call with the same tensors.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes of the widest access: addresses that are multiples of it are read and written in full vectors."""

_CACHE_ENTRIES = 256


@dataclass(frozen=True)
class _Entry:
    tensor: Tensor
    # The pinned source, which a captured upload reads at each replay.
    source: Tensor
    stream: int
    event: "torch.cuda.Event | None"


_cache: OrderedDict[tuple, _Entry] = OrderedDict()
_captured: dict[int, _Entry] = {}
_lock = threading.Lock()


def _upload(values: Tensor, device: torch.device) -> _Entry:
    if device.type != "cuda":
        return _Entry(values.to(device), values, 0, None)
    source = values.pin_memory()
    tensor = source.to(device, non_blocking=True)
    stream = torch.cuda.current_stream(device)
    event = torch.cuda.Event()
    event.record(stream)
    return _Entry(tensor, source, stream.cuda_stream, event)


def _cached(key: tuple, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
    """The device copy of ``build()``, cached by ``key``."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = (*key, device)
    with _lock:
        entry = _cache.get(key)
        if entry is not None:
            _cache.move_to_end(key)
        else:
            entry = _upload(build(), device)
            # A table uploaded under capture is empty until the first replay, so no other call may find it.
            if not capturing:
                _cache[key] = entry
                if len(_cache) > _CACHE_ENTRIES:
                    _cache.popitem(last=False)
        if capturing:
            _captured[id(entry)] = entry
    if entry.event is not None and not capturing:
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream != entry.stream:
            stream.wait_event(entry.event)
            entry.tensor.record_stream(stream)
    return entry.tensor


_SCRATCH_ENTRIES = 32
_scratch: OrderedDict[tuple, Tensor] = OrderedDict()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory between two launches of one call: the same at every call of a thread on a stream, so that a steady loop
    allocates nothing. A captured call has its own, of the graph's memory."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.empty(shape, dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    key = (purpose, shape, dtype, device, stream, threading.get_ident())
    with _lock:
        memory = _scratch.get(key)
        if memory is None:
            memory = _scratch[key] = torch.empty(shape, dtype=dtype, device=device)
            if len(_scratch) > _SCRATCH_ENTRIES:
                _scratch.popitem(last=False)
        _scratch.move_to_end(key)
    return memory


@dataclass(frozen=True)
class Pointers:
    """int64 [T] addresses on the device (0 for None), and whether all are multiples of ``ALIGNMENT``."""

    table: Tensor
    aligned: bool
    some_none: bool


def pointers(tensors: Sequence[Tensor | None], device: torch.device) -> Pointers:
    addresses = tuple([0 if t is None else t.data_ptr() for t in tensors])
    aligned = not any(address % ALIGNMENT for address in addresses)
    return Pointers(int64_table(addresses, device), aligned, any(t is None for t in tensors))


def int64_table(values: Sequence[int], device: torch.device) -> Tensor:
    values = tuple(values)
    # A kernel argument needs an address, which an empty tensor lacks.
    return _cached(("int64", values), device, lambda: torch.tensor(values or (0,), dtype=torch.int64))


def float64_table(values: Sequence[float], device: torch.device) -> Tensor:
    values = tuple(values)
    return _cached(("float64", values), device, lambda: torch.tensor(values, dtype=torch.float64))


@dataclass(frozen=True)
class Chunks:
    """The chunks of ``block`` entries that some tensors are cut into.

    table: int64 [3, count]: tensor, first entry, and number of the chunk among those of all tensors.
    """

    table: Tensor
    count: int


def chunks(numels: Sequence[int], block: int, device: torch.device, members: tuple[int, ...] | None = None) -> Chunks:
    """Chunks of the tensors ``members`` (all of them: None), in order. ``numels`` counts all tensors' entries."""
    numels = tuple(numels)

    def build() -> Tensor:
        per_tensor = (torch.tensor(numels, dtype=torch.int64) + (block - 1)) // block
        tensor = torch.repeat_interleave(torch.arange(len(numels)), per_tensor)
        rank = torch.arange(tensor.numel())
        start = (rank - (per_tensor.cumsum(0) - per_tensor)[tensor]) * block
        table = torch.stack([tensor, start, rank])
        return table if members is None else table[:, torch.isin(tensor, torch.tensor(members))].contiguous()

    chosen = range(len(numels)) if members is None else members
    count = sum(-(-numels[i] // block) for i in chosen)
    if count == 0:
        return Chunks(int64_table((), device), 0)
    return Chunks(_cached(("chunks", numels, block, members), device, build), count)


def groups(keys: Sequence) -> list[tuple[object, tuple[int, ...] | None]]:
    """Indices by key, in order of first appearance; None instead of the indices if all keys are equal."""
    members: dict = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    if len(members) == 1:
        return [(next(iter(members)), None)]
    return [(key, tuple(indices)) for key, indices in members.items()]


def numels_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([t.numel() for t in tensors])


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes the tensors' device the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
