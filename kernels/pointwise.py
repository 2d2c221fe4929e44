"""apply_mask_, accumulate_ and count_nonfinite. The signatures are those of ``pecker_fast/ops/schemas.py``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import load_bits
from .tables import Chunks, addresses, numbers

# Streaming kernels: with 4 warps two 16-byte accesses a lane, and programs enough to fill a GPU from a million entries.
BLOCK = 1024
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _apply_mask_kernel(pointers, word_offsets, words, chunks, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 4 * chunk)
    entries = tl.load(chunks + 4 * chunk + 1) + tl.arange(0, BLOCK)
    valid = entries < tl.load(chunks + 4 * chunk + 2)
    data = tl.load(pointers + tensor).to(tl.pointer_type(TYPE))
    bit = load_bits(words + tl.load(word_offsets + tensor), entries, valid)
    tl.store(data + entries, tl.zeros((BLOCK,), TYPE), mask=valid & (bit == 0))


@triton.jit
def _accumulate_kernel(
    targets, sources, chunks, REDUCE: tl.constexpr, TARGET: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 4 * chunk)
    entries = tl.load(chunks + 4 * chunk + 1) + tl.arange(0, BLOCK)
    valid = entries < tl.load(chunks + 4 * chunk + 2)
    target = tl.load(targets + tensor).to(tl.pointer_type(TARGET))
    source = tl.load(sources + tensor).to(tl.pointer_type(TYPE))
    value = tl.load(source + entries, mask=valid, other=0.0).to(TARGET)
    if REDUCE == "abs_sum":
        value = tl.abs(value)
    if REDUCE == "sq_sum":
        value = value * value
    tl.store(target + entries, tl.load(target + entries, mask=valid, other=0.0) + value, mask=valid)


@triton.jit
def _count_nonfinite_kernel(
    grads,
    masked_grads,
    word_offsets,
    words,
    scale,
    chunks,
    counts,
    JOINT: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 4 * chunk)
    entries = tl.load(chunks + 4 * chunk + 1) + tl.arange(0, BLOCK)
    valid = entries < tl.load(chunks + 4 * chunk + 2)
    factor = tl.full((1,), 1.0, COMPUTE)
    if HAS_SCALE:
        factor = factor / tl.load(scale).to(COMPUTE)
    address = tl.load(grads + tensor)
    g = (
        tl.load(address.to(tl.pointer_type(TYPE)) + entries, mask=valid & (address != 0), other=0.0).to(COMPUTE)
        * factor
    )
    bit = tl.full((BLOCK,), 1, tl.int32)
    if HAS_WORDS:
        bit = load_bits(words + tl.load(word_offsets + tensor), entries, valid)
    if JOINT:
        address = tl.load(masked_grads + tensor)
        more = tl.load(address.to(tl.pointer_type(TYPE)) + entries, mask=valid & (address != 0) & (bit != 0), other=0.0)
        g += more.to(COMPUTE) * factor
        bit = tl.full((BLOCK,), 1, tl.int32)
    # Of finite numbers only is the difference with themselves 0.
    bad = valid & (bit != 0) & ~((g - g) == 0.0)
    tl.store(counts + tl.load(chunks + 4 * chunk + 3), tl.sum(bad.to(tl.int64), axis=0))


def _by_dtype(tensors: Sequence[Tensor], device: torch.device):
    numels = [tensor.numel() for tensor in tensors]
    for dtype in {tensor.dtype for tensor in tensors}:
        chunks = Chunks(numels, BLOCK, device, [tensor.dtype == dtype for tensor in tensors])
        if chunks.count:
            yield dtype, chunks


def apply_mask_(tensors: Sequence[Tensor], words: Tensor, word_offsets: Sequence[int]) -> None:
    device = words.device
    pointers = addresses(tensors, device)
    offsets = numbers(list(word_offsets)[: len(tensors)], torch.int64, device)
    for dtype, chunks in _by_dtype(tensors, device):
        _apply_mask_kernel[(chunks.count,)](pointers, offsets, words, chunks.table, TYPE=TYPES[dtype], BLOCK=BLOCK)


def accumulate_(accumulators: Sequence[Tensor], grads: Sequence[Tensor], reduce: str) -> None:
    if not accumulators:
        return
    device = accumulators[0].device
    targets, sources = addresses(accumulators, device), addresses(grads, device)
    for dtype, chunks in _by_dtype(grads, device):
        _accumulate_kernel[(chunks.count,)](
            targets,
            sources,
            chunks.table,
            REDUCE=reduce,
            TARGET=tl.float64 if dtype == torch.float64 else tl.float32,
            TYPE=TYPES[dtype],
            BLOCK=BLOCK,
        )


def count_nonfinite(
    grads: Sequence[Tensor | None],
    masked_grads: Sequence[Tensor | None],
    words: Tensor | None,
    word_offsets: Sequence[int],
    grad_scale: Tensor | None = None,
) -> Tensor:
    joint = len(masked_grads) > 0
    likes = [g if g is not None else (masked_grads[i] if joint else None) for i, g in enumerate(grads)]
    present = [like for like in likes if like is not None]
    if not present:
        return torch.zeros((), dtype=torch.int64, device=words.device if words is not None else None)
    dtype, device = present[0].dtype, present[0].device
    chunks = Chunks([0 if like is None else like.numel() for like in likes], BLOCK, device)
    counts = torch.zeros(max(chunks.total, 1), dtype=torch.int64, device=device)
    if chunks.count:
        pointers = addresses(grads, device)
        _count_nonfinite_kernel[(chunks.count,)](
            pointers,
            addresses(masked_grads, device) if joint else pointers,
            numbers(list(word_offsets)[: len(grads)], torch.int64, device) if words is not None else pointers,
            words if words is not None else pointers,
            grad_scale if grad_scale is not None else pointers,
            chunks.table,
            counts,
            JOINT=joint,
            HAS_WORDS=words is not None,
            HAS_SCALE=grad_scale is not None,
            TYPE=TYPES[dtype],
            COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK=BLOCK,
        )
    return counts.sum()
