"""accumulate_, apply_mask_ and count_nonfinite: one pass over the tensors, one launch for each combination of dtypes.

Fixed configuration: 16 entries a thread keep enough loads in flight to fill the memory, and a chunk of 4,096 is small
enough that a U-Net's many small tensors waste little.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import chunks, groups, int64_table, numels_of, on_device, pointers
from .tiles import FLOAT_TYPES, kernel, load_words, pointer_at, tile_bits, tile_length, tile_offsets, widen

BLOCK = 4096
NUM_WARPS = 8

_REDUCTIONS = {"sum": 0, "abs_sum": 1, "sq_sum": 2}
_INTEGER_TYPES = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _add_tile(accumulator, grad, mask, REDUCE: tl.constexpr, ACC: tl.constexpr, GRAD: tl.constexpr):
    value = widen(tl.load(grad, mask=mask), GRAD, ACC)
    if REDUCE == 1:
        value = tl.abs(value)
    elif REDUCE == 2:
        value = value * value
    tl.store(accumulator, tl.load(accumulator, mask=mask) + value, mask=mask)


@kernel
def accumulate_kernel(
    accumulators,
    grads,
    numels,
    chunk_table,
    n_chunks,
    REDUCE: tl.constexpr,
    ACC: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_table + chunk)
    start = tl.load(chunk_table + n_chunks + chunk)
    length = tile_length(start, tl.load(numels + tensor), BLOCK)
    offsets = tile_offsets(BLOCK)
    accumulator = pointer_at(tl.load(accumulators + tensor), start, ACC, ALIGNED) + offsets
    grad = pointer_at(tl.load(grads + tensor), start, GRAD, ALIGNED) + offsets
    if length == BLOCK:
        _add_tile(accumulator, grad, None, REDUCE, ACC, GRAD)
    else:
        _add_tile(accumulator, grad, offsets < length, REDUCE, ACC, GRAD)


def accumulate_(accumulators: Sequence[Tensor], grads: Sequence[Tensor], reduce: str, *, block: int = BLOCK) -> None:
    if not accumulators:
        return
    device = accumulators[0].device
    numels = numels_of(accumulators)
    with on_device(device):
        accumulator_table, grad_table = pointers(accumulators, device), pointers(grads, device)
        for (acc, grad), members in groups([(a.dtype, g.dtype) for a, g in zip(accumulators, grads, strict=True)]):
            work = chunks(numels, block, device, members)
            if work.count:
                accumulate_kernel[(work.count,)](
                    accumulator_table.table,
                    grad_table.table,
                    int64_table(numels, device),
                    work.table,
                    work.count,
                    REDUCE=_REDUCTIONS[reduce],
                    ACC=FLOAT_TYPES[acc],
                    GRAD=FLOAT_TYPES[grad],
                    ALIGNED=accumulator_table.aligned and grad_table.aligned,
                    BLOCK=block,
                    num_warps=NUM_WARPS,
                    # A square is rounded before it is added, as the definition has it.
                    enable_fp_fusion=False,
                )


@kernel
def apply_mask_kernel(
    tensors,
    numels,
    words,
    word_offsets,
    chunk_table,
    n_chunks,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_table + chunk)
    start = tl.load(chunk_table + n_chunks + chunk)
    length = tile_length(start, tl.load(numels + tensor), BLOCK)
    tile_words = load_words(words + tl.load(word_offsets + tensor) + start // 32, length, BLOCK // 32)
    offsets = tile_offsets(BLOCK)
    # Nothing is read but the mask. Not ALIGNED: see pointer_at.
    pointer = pointer_at(tl.load(tensors + tensor), start, INTEGER, False) + offsets
    cleared = (tile_bits(tile_words) == 0) & (offsets < length)
    tl.store(pointer, tl.zeros((BLOCK // 32, 32), INTEGER), mask=cleared)


def apply_mask_(tensors: Sequence[Tensor], words: Tensor, word_offsets: Sequence[int], *, block: int = BLOCK) -> None:
    device = words.device
    numels = numels_of(tensors)
    with on_device(device):
        for size, members in groups([t.element_size() for t in tensors]) if tensors else ():
            work = chunks(numels, block, device, members)
            if work.count:
                apply_mask_kernel[(work.count,)](
                    pointers(tensors, device).table,
                    int64_table(numels, device),
                    words,
                    int64_table(word_offsets, device),
                    work.table,
                    work.count,
                    INTEGER=_INTEGER_TYPES[size],
                    BLOCK=block,
                    num_warps=NUM_WARPS,
                )


@triton.jit
def _count_tile(
    grad,
    masked_grad,
    has_grad,
    has_masked_grad,
    inverse_scale,
    offsets,
    bits,
    mask,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    JOINT: tl.constexpr,
    FULL: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    present = tl.full(offsets.shape, True, tl.int1) & has_grad
    if not FULL:
        present = present & mask
    g = widen(tl.load(grad + offsets, mask=present, other=0), DTYPE, COMPUTE)
    if SCALED:
        g = g * inverse_scale
    if JOINT:
        present = tl.full(offsets.shape, True, tl.int1) & has_masked_grad
        if not FULL:
            present = present & mask
        if MASKED:
            present = present & (bits != 0)
        more = widen(tl.load(masked_grad + offsets, mask=present, other=0), DTYPE, COMPUTE)
        if SCALED:
            more = more * inverse_scale
        g += more
    bad = tl.abs(g) < float("inf")
    bad = bad == 0
    if MASKED and not JOINT:
        bad = bad & (bits != 0)
    return tl.sum(tl.sum(bad.to(tl.int32), axis=1), axis=0)


@kernel
def count_nonfinite_kernel(
    grads,
    masked_grads,
    numels,
    words,
    word_offsets,
    grad_scale,
    chunk_table,
    n_chunks,
    total,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    JOINT: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_table + chunk)
    start = tl.load(chunk_table + n_chunks + chunk)
    length = tile_length(start, tl.load(numels + tensor), BLOCK)
    offsets = tile_offsets(BLOCK)
    grad_address = tl.load(grads + tensor)
    grad = pointer_at(grad_address, start, DTYPE, ALIGNED)
    masked_grad_address = grad_address
    if JOINT:
        masked_grad_address = tl.load(masked_grads + tensor)
    masked_grad = pointer_at(masked_grad_address, start, DTYPE, ALIGNED)
    inverse_scale = 1.0
    if SCALED:
        scale = tl.load(grad_scale).to(COMPUTE)
        inverse_scale = tl.div_rn(tl.full((), 1.0, COMPUTE), scale) if COMPUTE == tl.float32 else 1.0 / scale
    bits = offsets
    if MASKED:
        bits = tile_bits(load_words(words + tl.load(word_offsets + tensor) + start // 32, length, BLOCK // 32))
    has_grad = grad_address != 0
    has_masked = masked_grad_address != 0
    if length == BLOCK:
        bad = _count_tile(
            grad, masked_grad, has_grad, has_masked, inverse_scale, offsets, bits, offsets < length,
            SCALED, MASKED, JOINT, True, DTYPE, COMPUTE,
        )  # fmt: skip
    else:
        bad = _count_tile(
            grad, masked_grad, has_grad, has_masked, inverse_scale, offsets, bits, offsets < length,
            SCALED, MASKED, JOINT, False, DTYPE, COMPUTE,
        )  # fmt: skip
    if bad > 0:
        tl.atomic_add(total, bad.to(tl.int64), sem="relaxed")


def count_nonfinite(
    grads: Sequence[Tensor | None],
    masked_grads: Sequence[Tensor | None],
    words: Tensor | None,
    word_offsets: Sequence[int],
    grad_scale: Tensor | None = None,
    *,
    block: int = BLOCK,
) -> Tensor:
    joint = len(masked_grads) > 0
    likes = [g if g is not None or not joint else masked_grads[i] for i, g in enumerate(grads)]
    present = [t for t in likes if t is not None]
    if not present:
        return torch.zeros((), dtype=torch.int64, device=words.device if words is not None else None)
    device = present[0].device
    numels = tuple([0 if t is None else t.numel() for t in likes])
    with on_device(device):
        total = torch.zeros((), dtype=torch.int64, device=device)
        grad_table = pointers(grads, device)
        masked_table = pointers(masked_grads, device) if joint else grad_table
        for dtype, members in groups([None if t is None else t.dtype for t in likes]):
            work = chunks(numels, block, device, members)
            if work.count:
                count_nonfinite_kernel[(work.count,)](
                    grad_table.table,
                    masked_table.table,
                    int64_table(numels, device),
                    total if words is None else words,
                    int64_table(word_offsets, device),
                    total if grad_scale is None else grad_scale,
                    work.table,
                    work.count,
                    total,
                    SCALED=grad_scale is not None,
                    MASKED=words is not None,
                    JOINT=joint,
                    DTYPE=FLOAT_TYPES[dtype],
                    COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
                    ALIGNED=grad_table.aligned and masked_table.aligned,
                    BLOCK=block,
                    num_warps=NUM_WARPS,
                )
    return total
