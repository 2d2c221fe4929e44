"""One tile of an Adam step: ``masked_adam_`` of ``ops/reference.py`` for up to a block of entries of one tensor."""

import triton
import triton.language as tl

from .tiles import exclusive_ranks, mix, narrow, pointer_at, tile_bits, tile_offsets, widen

# Places in the table of hyper-parameters.
EPS_AT = tl.constexpr(0)
WEIGHT_DECAY_AT = tl.constexpr(1)
CLIP_AT = tl.constexpr(2)
MAX_UPDATE_AT = tl.constexpr(3)
EMA_RATE_AT = tl.constexpr(4)
BETA2_AT = tl.constexpr(5)
RATE1_AT = tl.constexpr(6)
RATE2_AT = tl.constexpr(7)
LOG2_BETA1_AT = tl.constexpr(8)
LOG2_BETA2_AT = tl.constexpr(9)
HASH_AT = tl.constexpr(10)


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
def step_tile(
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
    clip = tl.load(hyper + CLIP_AT).to(COMPUTE)
    g = _condition(g, clip, ZERO_NONFINITE, CLIP, MAXIMIZE)
    if RETAIN:
        h = _condition(h, clip, ZERO_NONFINITE, CLIP, MAXIMIZE)

    old = old_raw
    if not HAS_MASTER:
        old = widen(old_raw, DTYPE, COMPUTE)
    x = old
    weight_decay = tl.load(hyper + WEIGHT_DECAY_AT).to(COMPUTE)
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
        m = old_m + tl.load(hyper + RATE1_AT).to(COMPUTE) * (g - old_m)
        tl.store(exp_avg, m, mask=touched)
    if MASKED:
        exp_avg_sq = pointer_at(tl.load(exp_avg_sqs + tensor), at, COMPUTE, ALIGNED) + slots
        old_v = _load(exp_avg_sq, touched)
    v = tl.load(hyper + BETA2_AT).to(COMPUTE) * old_v
    v = v + tl.load(hyper + RATE2_AT).to(COMPUTE) * h * h
    tl.store(exp_avg_sq, v, mask=touched)
    if HAS_MAX:
        if MASKED:
            largest = pointer_at(tl.load(max_exp_avg_sqs + tensor), at, COMPUTE, ALIGNED) + slots
            old_largest = _load(largest, touched)
        # NaN in either stays, as in torch.maximum.
        v = tl.where((old_largest > v) | (old_largest != old_largest), old_largest, v)
        tl.store(largest, v, mask=touched)
    eps = tl.load(hyper + EPS_AT).to(COMPUTE)
    update = _divide(rate * inverse1 * m, _square_root(v, COMPUTE) * inverse2 + eps, COMPUTE)
    if MAX_UPDATE:
        update = _clamp(update, tl.load(hyper + MAX_UPDATE_AT).to(COMPUTE) * rate)
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
        tl.store(ema, average + tl.load(hyper + EMA_RATE_AT).to(COMPUTE) * (target - average), mask=read)
