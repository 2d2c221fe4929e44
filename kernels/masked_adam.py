"""masked_adam_: one Adam step over all tensors. The equations are in ``masked_adam_`` of ``ops/reference.py``.

Two launches: first the values of each tensor (bias corrections in float64, the hash of its random bits), then the step.
Every hyper-parameter that a schedule may change is read from device memory, so a new value recompiles nothing.

Fixed configuration: tiles of 2,048 entries with 8 warps are 8 entries a thread and array, which is two 16-byte accesses
in flight for each of up to 8 arrays and fits the registers of full occupancy but one step. Plain and joint steps access
whole tiles in vectors. Masked steps are predicated entry by entry, for which the lanes of a warp take the 32 entries of
one mask word: vectors would be split into scattered accesses.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..ops.layout import PACK_BLOCK, num_blocks
from .tables import Pointers, chunks, float64_table, int64_table, numels_of, on_device, pointers, scratch
from .tiles import (
    FLOAT_TYPES,
    exclusive_ranks,
    kernel,
    load_words,
    mix,
    narrow,
    pointer_at,
    popcount,
    tile_bits,
    tile_length,
    tile_offsets,
    widen,
)

BLOCK = 2048
NUM_WARPS = 8
_TENSORS_PER_PROGRAM = 128

# Places in the table of hyper-parameters.
_EPS = tl.constexpr(0)
_WEIGHT_DECAY = tl.constexpr(1)
_CLIP = tl.constexpr(2)
_MAX_UPDATE = tl.constexpr(3)
_EMA_RATE = tl.constexpr(4)
_BETA2 = tl.constexpr(5)
_RATE1 = tl.constexpr(6)
_RATE2 = tl.constexpr(7)
_LOG2_BETA1 = tl.constexpr(8)
_LOG2_BETA2 = tl.constexpr(9)
_HASH = tl.constexpr(10)


@kernel
def prepare_kernel(steps, numbers, hyper, corrections, hashes, count, BLOCK: tl.constexpr):
    """Write for each tensor 1 / bc1 and 1 / sqrt(bc2), and the hash of seed, step and tensor for its random bits."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tensor < count
    step = tl.load(steps + tensor, mask=here, other=1)
    wide = step.to(tl.float64)
    inverse1 = 1.0 / (1.0 - tl.exp2(wide * tl.load(hyper + _LOG2_BETA1)))
    inverse2 = 1.0 / tl.sqrt(1.0 - tl.exp2(wide * tl.load(hyper + _LOG2_BETA2)))
    tl.store(corrections + 2 * tensor, inverse1.to(corrections.dtype.element_ty), mask=here)
    tl.store(corrections + 2 * tensor + 1, inverse2.to(corrections.dtype.element_ty), mask=here)
    state = tl.load(hyper + _HASH).to(tl.int64).to(tl.uint32)
    state = mix(state ^ step.to(tl.int64).to(tl.uint32))
    state = mix(state ^ tl.load(numbers + tensor, mask=here, other=0).to(tl.uint32))
    tl.store(hashes + tensor, state.to(tl.int64), mask=here)


@triton.jit
def _load(pointer, mask):
    """0 outside the mask; a mask of None reads whole vectors."""
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0)


@triton.jit
def _gradient(
    address,
    start,
    offsets,
    mask,
    inverse_scale,
    SCALED: tl.constexpr,
    OPTIONAL: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """An unscaled gradient; 0 outside the mask and, if OPTIONAL, of a missing tensor (address 0)."""
    pointer = pointer_at(address, start, DTYPE, ALIGNED) + offsets
    if OPTIONAL:
        there = tl.full(offsets.shape, True, tl.int1) & (address != 0)
        if mask is None:
            g = widen(tl.load(pointer, mask=there, other=0), DTYPE, COMPUTE)
        else:
            g = widen(tl.load(pointer, mask=mask & there, other=0), DTYPE, COMPUTE)
    else:
        g = widen(_load(pointer, mask), DTYPE, COMPUTE)
    if SCALED:
        g = g * inverse_scale
    return g


@triton.jit
def _clamp(x, limit):
    # Comparisons with NaN are false, so that NaN stays.
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _condition(g, clip, ZERO_NONFINITE: tl.constexpr, CLIP: tl.constexpr, MAXIMIZE: tl.constexpr):
    if ZERO_NONFINITE:
        g = tl.where(tl.abs(g) < float("inf"), g, 0.0)
    if CLIP:
        g = _clamp(g, clip)
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def _divide(a, b, COMPUTE: tl.constexpr):
    return a / b if COMPUTE == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _square_root(x, COMPUTE: tl.constexpr):
    return tl.sqrt(x) if COMPUTE == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _round_stochastic(x, bits, DTYPE: tl.constexpr):
    """float32 to bfloat16 or float16, as ``round_stochastic`` of the reference does it."""
    raw = x.to(tl.uint32, bitcast=True)
    if DTYPE == tl.bfloat16:
        rounded = ((raw + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        normal = ((raw + (bits & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 float16 values are 2^-24 apart: 13 random bits as a fraction of that spacing.
        steps = tl.floor(tl.abs(x) * 16777216.0 + (bits & 0x1FFF).to(tl.float32) * 0.0001220703125)
        magnitude = (steps * 5.9604644775390625e-08).to(tl.uint32, bitcast=True)
        subnormal = (magnitude | (raw & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, subnormal, normal)
    return narrow(tl.where(tl.abs(x) < float("inf"), rounded, x), DTYPE)


@triton.jit
def _step_tile(
    param_address,
    grad_address,
    masked_grad_address,
    moments,
    extras,
    tensor,
    start,
    length,
    tile_words,
    packed_start,
    corrections,
    hashes,
    hyper,
    lr,
    bias_table,
    bias_rows,
    grad_scale,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_TOP: tl.constexpr,
    MASKED: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    PACKED: tl.constexpr,
    GRADS_OPTIONAL: tl.constexpr,
    HAS_M: tl.constexpr,
    HAS_MAX: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_EMA: tl.constexpr,
    SCALED: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CLIP: tl.constexpr,
    MAX_UPDATE: tl.constexpr,
    RETAIN: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    EMA_EVERYWHERE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FULL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    exp_avgs, exp_avg_sqs, max_exp_avg_sqs = moments
    masters, emas, counts = extras
    offsets = tile_offsets(BLOCK)
    # `inside`: the tensor's entries; `touched`: those to update; `salient`: those that have a masked gradient.
    inside = None
    if not FULL:
        inside = offsets < length
    touched = inside
    salient = inside
    if HAS_WORDS:
        salient = tile_bits(tile_words) != 0
    if MASKED:
        touched = salient
    at = start
    slots = offsets
    if PACKED:
        at = packed_start
        slots = exclusive_ranks(tile_words)

    # In plain and joint steps all loads of the tile come before its arithmetic and its stores: they wait for memory
    # together. Masked steps access entry by entry, and the addresses of all lists at once would not fit the registers.
    param = pointer_at(param_address, start, DTYPE, ALIGNED) + offsets
    read = touched
    if EMA_EVERYWHERE:
        read = inside
    master = param
    if HAS_MASTER:
        master = pointer_at(tl.load(masters + tensor), start, COMPUTE, ALIGNED) + offsets
        old_raw = _load(master, read)
    else:
        old_raw = _load(param, read)
    if HAS_M and not MASKED:
        exp_avg = pointer_at(tl.load(exp_avgs + tensor), at, COMPUTE, ALIGNED) + slots
        old_m = _load(exp_avg, touched)
    if not MASKED:
        exp_avg_sq = pointer_at(tl.load(exp_avg_sqs + tensor), at, COMPUTE, ALIGNED) + slots
        old_v = _load(exp_avg_sq, touched)
    if HAS_MAX and not MASKED:
        largest = pointer_at(tl.load(max_exp_avg_sqs + tensor), at, COMPUTE, ALIGNED) + slots
        old_largest = _load(largest, touched)
    if HAS_EMA and not MASKED:
        ema = pointer_at(tl.load(emas + tensor), start, COMPUTE, ALIGNED) + offsets
        average = _load(ema, read)

    rate = tl.load(lr).to(COMPUTE)
    inverse_scale = rate
    if SCALED:
        inverse_scale = _divide(tl.full((), 1.0, COMPUTE), tl.load(grad_scale).to(COMPUTE), COMPUTE)
    h = _gradient(grad_address, start, offsets, touched, inverse_scale, SCALED, GRADS_OPTIONAL, DTYPE, COMPUTE, ALIGNED)
    g = h
    if JOINT:
        g = h + _gradient(
            masked_grad_address, start, offsets, salient, inverse_scale, SCALED, GRADS_OPTIONAL, DTYPE, COMPUTE, ALIGNED
        )
    clip = tl.load(hyper + _CLIP).to(COMPUTE)
    g = _condition(g, clip, ZERO_NONFINITE, CLIP, MAXIMIZE)
    if RETAIN:
        h = _condition(h, clip, ZERO_NONFINITE, CLIP, MAXIMIZE)

    old = old_raw
    if not HAS_MASTER:
        old = widen(old_raw, DTYPE, COMPUTE)
    x = old
    weight_decay = tl.load(hyper + _WEIGHT_DECAY).to(COMPUTE)
    if DECOUPLED:
        x = x * (1.0 - rate * weight_decay)
    if COUPLED:
        g = g + weight_decay * x
        if RETAIN:
            h = h + weight_decay * x
    if not RETAIN:
        h = g

    if COUNT is None:
        inverse1 = tl.load(corrections + 2 * tensor)
        inverse2 = tl.load(corrections + 2 * tensor + 1)
    else:
        count = tl.load(counts + tensor).to(tl.pointer_type(COUNT)) + at + slots
        # The largest value stays.
        c = tl.minimum(_load(count, touched).to(tl.int32), COUNT_TOP - 1) + 1
        tl.store(count, c.to(COUNT), mask=touched)
        row = bias_table + 2 * tl.minimum(c, bias_rows - 1)
        inverse1 = tl.load(row)
        inverse2 = tl.load(row + 1)

    m = g
    if HAS_M:
        if MASKED:
            exp_avg = pointer_at(tl.load(exp_avgs + tensor), at, COMPUTE, ALIGNED) + slots
            old_m = _load(exp_avg, touched)
        m = old_m + tl.load(hyper + _RATE1).to(COMPUTE) * (g - old_m)
        tl.store(exp_avg, m, mask=touched)
    if MASKED:
        exp_avg_sq = pointer_at(tl.load(exp_avg_sqs + tensor), at, COMPUTE, ALIGNED) + slots
        old_v = _load(exp_avg_sq, touched)
    v = tl.load(hyper + _BETA2).to(COMPUTE) * old_v
    v = v + tl.load(hyper + _RATE2).to(COMPUTE) * h * h
    tl.store(exp_avg_sq, v, mask=touched)
    if HAS_MAX:
        if MASKED:
            largest = pointer_at(tl.load(max_exp_avg_sqs + tensor), at, COMPUTE, ALIGNED) + slots
            old_largest = _load(largest, touched)
        # NaN in either stays, as in torch.maximum.
        v = tl.where((old_largest > v) | (old_largest != old_largest), old_largest, v)
        tl.store(largest, v, mask=touched)
    eps = tl.load(hyper + _EPS).to(COMPUTE)
    update = _divide(rate * inverse1 * m, _square_root(v, COMPUTE) * inverse2 + eps, COMPUTE)
    if MAX_UPDATE:
        update = _clamp(update, tl.load(hyper + _MAX_UPDATE).to(COMPUTE) * rate)
    x = x - update
    if HAS_MASTER:
        tl.store(master, x, mask=touched)
    if STOCHASTIC:
        # A tile lies within 2^32 entries, so that the high half is common to it.
        state = mix(tl.load(hashes + tensor).to(tl.uint32) ^ (start >> 32).to(tl.uint32))
        low = ((start & 0xFFFFFFFF) + offsets).to(tl.uint32)
        stored = _round_stochastic(x, mix(state ^ low), DTYPE)
    else:
        stored = narrow(x, DTYPE)
    tl.store(param, stored, mask=touched)
    if HAS_EMA:
        target = x
        if not HAS_MASTER:
            target = widen(stored, DTYPE, COMPUTE)
        if EMA_EVERYWHERE:
            target = tl.where(touched, target, old)
        if MASKED:
            ema = pointer_at(tl.load(emas + tensor), start, COMPUTE, ALIGNED) + offsets
            average = _load(ema, read)
        tl.store(ema, average + tl.load(hyper + _EMA_RATE).to(COMPUTE) * (target - average), mask=read)


@kernel
def masked_adam_kernel(
    # Not "params": triton's own generated code has a variable of that name.
    param_addresses,
    grads,
    masked_grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    masters,
    emas,
    counts,
    numels,
    chunk_table,
    n_chunks,
    words,
    word_offsets,
    packed_offsets,
    first_blocks,
    corrections,
    hashes,
    hyper,
    lr,
    bias_table,
    bias_rows,
    grad_scale,
    found_inf,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_TOP: tl.constexpr,
    MASKED: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    PACKED: tl.constexpr,
    GRADS_OPTIONAL: tl.constexpr,
    HAS_M: tl.constexpr,
    HAS_MAX: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_EMA: tl.constexpr,
    SCALED: tl.constexpr,
    GUARDED: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CLIP: tl.constexpr,
    MAX_UPDATE: tl.constexpr,
    RETAIN: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    EMA_EVERYWHERE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if GUARDED:
        if tl.load(found_inf) != 0:
            return
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_table + chunk)
    start = tl.load(chunk_table + n_chunks + chunk)
    length = tile_length(start, tl.load(numels + tensor), BLOCK)
    grad_address = tl.load(grads + tensor)
    masked_grad_address = grad_address
    if JOINT:
        masked_grad_address = tl.load(masked_grads + tensor)
    # Without any gradient the tensor is left out of the step.
    if (grad_address == 0) & (masked_grad_address == 0):
        return
    tile_words = length
    packed_start = start
    if HAS_WORDS:
        tensor_words = words + tl.load(word_offsets + tensor)
        tile_words = load_words(tensor_words + start // 32, length, BLOCK // 32)
        if MASKED and not EMA_EVERYWHERE:
            if tl.max((tile_words != 0).to(tl.int32), axis=0) == 0:
                return
        if PACKED:
            block = start // PACK_BLOCK
            rows = tl.arange(0, PACK_BLOCK // 32)
            earlier = rows < ((start - block * PACK_BLOCK) // 32).to(tl.int32)
            before = tl.load(tensor_words + block * (PACK_BLOCK // 32) + rows, mask=earlier, other=0)
            packed_start = tl.load(packed_offsets + tl.load(first_blocks + tensor) + block)
            packed_start += tl.sum(popcount(before), axis=0)
    moments = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    extras = (masters, emas, counts)
    param_address = tl.load(param_addresses + tensor)
    if MASKED:
        _step_tile(
            param_address, grad_address, masked_grad_address, moments, extras, tensor, start, length, tile_words,
            packed_start, corrections, hashes, hyper, lr, bias_table, bias_rows, grad_scale,
            DTYPE, COMPUTE, COUNT, COUNT_TOP, MASKED, JOINT, HAS_WORDS, PACKED, GRADS_OPTIONAL, HAS_M, HAS_MAX,
            HAS_MASTER, HAS_EMA, SCALED, COUPLED, DECOUPLED, MAXIMIZE, CLIP, MAX_UPDATE, RETAIN, ZERO_NONFINITE,
            EMA_EVERYWHERE, STOCHASTIC, False, False, BLOCK,
        )  # fmt: skip
    elif length == BLOCK:
        _step_tile(
            param_address, grad_address, masked_grad_address, moments, extras, tensor, start, length, tile_words,
            packed_start, corrections, hashes, hyper, lr, bias_table, bias_rows, grad_scale,
            DTYPE, COMPUTE, COUNT, COUNT_TOP, MASKED, JOINT, HAS_WORDS, PACKED, GRADS_OPTIONAL, HAS_M, HAS_MAX,
            HAS_MASTER, HAS_EMA, SCALED, COUPLED, DECOUPLED, MAXIMIZE, CLIP, MAX_UPDATE, RETAIN, ZERO_NONFINITE,
            EMA_EVERYWHERE, STOCHASTIC, True, ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        _step_tile(
            param_address, grad_address, masked_grad_address, moments, extras, tensor, start, length, tile_words,
            packed_start, corrections, hashes, hyper, lr, bias_table, bias_rows, grad_scale,
            DTYPE, COMPUTE, COUNT, COUNT_TOP, MASKED, JOINT, HAS_WORDS, PACKED, GRADS_OPTIONAL, HAS_M, HAS_MAX,
            HAS_MASTER, HAS_EMA, SCALED, COUPLED, DECOUPLED, MAXIMIZE, CLIP, MAX_UPDATE, RETAIN, ZERO_NONFINITE,
            EMA_EVERYWHERE, STOCHASTIC, False, ALIGNED, BLOCK,
        )  # fmt: skip


_U32 = 0xFFFFFFFF


def _mix(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & _U32
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & _U32
    return x ^ (x >> 16)


def _seed_hash(seed: int) -> int:
    return _mix((seed & _U32) ^ _mix(((seed >> 32) + 0x9E3779B9) & _U32))


def masked_adam_(
    params,
    grads,
    masked_grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    masters,
    emas,
    counts,
    steps,
    lr,
    bias_table,
    words,
    word_offsets,
    packed_offsets,
    grad_scale,
    found_inf,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
    max_update: float | None = None,
    retain_variance: bool = False,
    zero_nonfinite: bool = False,
    ema_decay: float | None = None,
    ema_everywhere: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
    tensor_numbers: Sequence[int] = (),
    block: int = BLOCK,
) -> None:
    if not params:
        return
    device, dtype = params[0].device, params[0].dtype
    numels = numels_of(params)
    joint = len(masked_grads) > 0
    masked = words is not None and not joint
    double = dtype == torch.float64
    with on_device(device):
        work = chunks(numels, block, device)
        if work.count == 0:
            return
        param_table = pointers(params, device)
        tables = [
            pointers(tensors, device) if tensors else param_table
            for tensors in (grads, masked_grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts)
        ]
        hyper = float64_table(
            (
                eps,
                weight_decay,
                clip_value or 0.0,
                max_update or 0.0,
                1 - ema_decay if ema_decay is not None else 0.0,
                beta2,
                1 - beta1,
                1 - beta2,
                math.log2(beta1) if beta1 else -math.inf,
                math.log2(beta2) if beta2 else -math.inf,
                float(_seed_hash(seed)),
            ),
            device,
        )
        compute = torch.float64 if double else torch.float32
        corrections = scratch("corrections", (len(params), 2), compute, device)
        hashes = scratch("hashes", (len(params),), torch.int64, device)
        numbers = int64_table(tensor_numbers or range(len(params)), device)
        prepare_kernel[(triton.cdiv(len(params), _TENSORS_PER_PROGRAM),)](
            steps, numbers, hyper, corrections, hashes, len(params), BLOCK=_TENSORS_PER_PROGRAM, num_warps=4
        )
        unused = hashes
        masked_adam_kernel[(work.count,)](
            param_table.table,
            *[table.table for table in tables],
            int64_table(numels, device),
            work.table,
            work.count,
            unused if words is None else words,
            unused if words is None else int64_table(word_offsets, device),
            unused if packed_offsets is None else packed_offsets,
            unused if packed_offsets is None else int64_table(_first_blocks(numels), device),
            corrections,
            hashes,
            hyper,
            lr,
            bias_table if counts else corrections,
            bias_table.shape[0] if counts else 0,
            unused if grad_scale is None else grad_scale,
            unused if found_inf is None else found_inf,
            DTYPE=FLOAT_TYPES[dtype],
            COMPUTE=tl.float64 if double else tl.float32,
            COUNT=None if not counts else tl.int16 if counts[0].dtype == torch.int16 else tl.int32,
            COUNT_TOP=torch.iinfo(counts[0].dtype).max if counts else 0,
            MASKED=masked,
            JOINT=joint,
            HAS_WORDS=words is not None,
            PACKED=packed_offsets is not None,
            GRADS_OPTIONAL=joint and _some_none(tables[:2]),
            HAS_M=len(exp_avgs) > 0,
            HAS_MAX=len(max_exp_avg_sqs) > 0,
            HAS_MASTER=len(masters) > 0,
            HAS_EMA=len(emas) > 0,
            SCALED=grad_scale is not None,
            GUARDED=found_inf is not None,
            COUPLED=weight_decay != 0 and not decoupled_weight_decay,
            DECOUPLED=weight_decay != 0 and decoupled_weight_decay,
            MAXIMIZE=maximize,
            CLIP=clip_value is not None,
            MAX_UPDATE=max_update is not None,
            RETAIN=retain_variance,
            ZERO_NONFINITE=zero_nonfinite,
            EMA_EVERYWHERE=masked and ema_everywhere,
            STOCHASTIC=stochastic_rounding and not masters and dtype in (torch.bfloat16, torch.float16),
            ALIGNED=all(table.aligned for table in (param_table, *tables)),
            PACK_BLOCK=PACK_BLOCK,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def _some_none(tables: list[Pointers]) -> bool:
    return any(table.some_none for table in tables)


def _first_blocks(numels: tuple[int, ...]) -> list[int]:
    """Entries of ``packed_offsets`` before those of each tensor."""
    first = [0]
    for numel in numels:
        first.append(first[-1] + num_blocks(numel))
    return first
