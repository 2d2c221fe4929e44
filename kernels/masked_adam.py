"""masked_adam_: one Adam step over all tensors in one launch. Equations: ``pecker_fast/ops/reference.py``."""

import torch
import triton
import triton.language as tl

from .bits import load_bits, salient_before
from .pointwise import TYPES
from .tables import Chunks, addresses, numbers

# Entries a program takes. 1,024 with 4 warps are 8 a lane: two 16-byte accesses of each float32 tensor in flight, and
# registers for them; a divisor of PACK_BLOCK, so that a program's packed state lies in one block.
BLOCK = 1024
WARPS = 4
PACK_BLOCK = 16384


@triton.jit
def _mix(x):
    """The finaliser of MurmurHash3 on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _random_bits(seed, step, tensor, entries):
    """uint32: ``random_bits`` of the reference."""
    state = _mix(((seed >> 32) & 0xFFFFFFFF).to(tl.uint32) + 0x9E3779B9)
    state = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ state)
    state = _mix(state ^ step.to(tl.int64).to(tl.uint32))
    state = _mix(state ^ tensor.to(tl.uint32))
    high = _mix(state ^ (entries >> 32).to(tl.uint32))
    return _mix(high ^ (entries & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def _round_stochastic(x, bits, TYPE: tl.constexpr):
    """float32 to bfloat16 or float16: ``round_stochastic`` of the reference."""
    raw = x.to(tl.uint32, bitcast=True)
    finite = (raw & 0x7FFFFFFF) < 0x7F800000
    if TYPE == tl.bfloat16:  # noqa: SIM300 (a constexpr)
        rounded = ((raw + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        normal = ((raw + (bits & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 float16 values are 2^-24 apart: the random bits are a fraction of that spacing.
        magnitude = (raw & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        steps = tl.floor(magnitude * 16777216.0 + (bits & 0x1FFF).to(tl.float32) * 0.0001220703125)
        sign = raw & 0x80000000
        subnormal = ((steps * 5.9604644775390625e-08).to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        rounded = tl.where(magnitude < 6.103515625e-05, subnormal, normal)
    return tl.where(finite, rounded, x).to(TYPE)


@triton.jit
def _clamp(x, limit):
    """NaN stays NaN: it compares as neither."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _condition(g, x, clip, decay, ZERO_NONFINITE: tl.constexpr, CLIP: tl.constexpr, COUPLED: tl.constexpr):
    if ZERO_NONFINITE:
        g = tl.where((g - g) == 0.0, g, 0.0)
    if CLIP:
        g = _clamp(g, clip)
    if COUPLED:
        g = g + decay * x
    return g


@triton.jit
def _adam_kernel(
    lists,  # int64 [9, n]: addresses of params, grads, masked_grads, exp_avgs, exp_avg_sqs, max, masters, emas, counts
    n,
    chunks,
    steps,
    lr,
    hyper,  # float64: beta1, beta2, eps, weight_decay, clip_value, max_update, 1 - ema_decay
    bias_table,
    bias_rows,
    words,
    word_offsets,
    packed_offsets,
    first_blocks,  # int64 [n]: pack blocks before each tensor
    grad_scale,
    found_inf,
    seed,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COUNT: tl.constexpr,
    MASKED: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_M: tl.constexpr,
    HAS_MAX: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_EMA: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    COUNT_MAX: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CLIP: tl.constexpr,
    MAX_UPDATE: tl.constexpr,
    RETAIN: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    EMA_FROZEN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
):
    if HAS_FOUND_INF:  # noqa: SIM102 (a constexpr condition around a device one)
        if tl.load(found_inf) != 0:
            return
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 4 * chunk)
    start = tl.load(chunks + 4 * chunk + 1)
    numel = tl.load(chunks + 4 * chunk + 2)
    entries = start + tl.arange(0, BLOCK)
    valid = entries < numel
    grad_address = tl.load(lists + n + tensor)
    forget_address = tl.load(lists + 2 * n + tensor)
    has_any = (grad_address != 0) | (forget_address != 0)
    if not has_any:
        return
    touched = valid
    bit = tl.full((BLOCK,), 1, tl.int32)
    if HAS_WORDS:
        tensor_words = words + tl.load(word_offsets + tensor)
        bit = load_bits(tensor_words, entries, valid)
        if MASKED:
            touched = valid & (bit != 0)
    # Where the state of an entry is: in place, or among the salient ones.
    slot = entries
    if PACKED:
        block = start // PACK_BLOCK
        before = tl.load(packed_offsets + tl.load(first_blocks + tensor) + block)
        before += salient_before(tensor_words, block * PACK_BLOCK, start, PACK_BLOCK)
        slot = before + tl.cumsum(bit, axis=0) - bit

    beta1, beta2 = tl.load(hyper), tl.load(hyper + 1)
    eps = tl.load(hyper + 2).to(COMPUTE)
    decay = tl.load(hyper + 3)
    clip = tl.load(hyper + 4).to(COMPUTE)
    rate64 = tl.load(lr)
    rate = rate64.to(COMPUTE)
    factor = tl.full((1,), 1.0, COMPUTE)
    if HAS_SCALE:
        factor = factor / tl.load(grad_scale).to(COMPUTE)

    h = tl.load(grad_address.to(tl.pointer_type(TYPE)) + entries, mask=touched & (grad_address != 0), other=0.0)
    h = h.to(COMPUTE) * factor
    g = h
    if JOINT:
        chosen = touched & (forget_address != 0) & (bit != 0)
        g = g + tl.load(forget_address.to(tl.pointer_type(TYPE)) + entries, mask=chosen, other=0.0).to(COMPUTE) * factor
    if MAXIMIZE:
        g = -g
        h = -h
    param = tl.load(lists + tensor).to(tl.pointer_type(TYPE)) + entries
    if HAS_MASTER:
        master = tl.load(lists + 6 * n + tensor).to(tl.pointer_type(COMPUTE)) + entries
        x = tl.load(master, mask=touched, other=0.0)
    else:
        x = tl.load(param, mask=touched, other=0.0).to(COMPUTE)
    coupled = decay.to(COMPUTE)
    g = _condition(g, x, clip, coupled, ZERO_NONFINITE, CLIP, COUPLED)
    if RETAIN:  # noqa: SIM108 (a constexpr)
        h = _condition(h, x, clip, coupled, ZERO_NONFINITE, CLIP, COUPLED)
    else:
        h = g
    if DECOUPLED:
        x = x * (1.0 - rate64 * decay).to(COMPUTE)

    if HAS_COUNTS:
        count = tl.load(lists + 8 * n + tensor).to(tl.pointer_type(COUNT)) + slot
        c = tl.minimum(tl.load(count, mask=touched, other=0).to(tl.int32), COUNT_MAX - 1) + 1
        tl.store(count, c.to(COUNT), mask=touched)
        row = 2 * tl.minimum(c, bias_rows - 1)
        inv_bc1 = tl.load(bias_table + row, mask=touched, other=1.0)
        inv_sqrt_bc2 = tl.load(bias_table + row + 1, mask=touched, other=1.0)
    else:
        step = tl.load(steps + tensor).to(tl.float64)
        inv_bc1 = (1.0 / (1.0 - tl.exp(step * tl.log(beta1)))).to(COMPUTE)
        inv_sqrt_bc2 = (1.0 / tl.sqrt(1.0 - tl.exp(step * tl.log(beta2)))).to(COMPUTE)

    m = g
    if HAS_M:
        exp_avg = tl.load(lists + 3 * n + tensor).to(tl.pointer_type(COMPUTE)) + slot
        m = tl.load(exp_avg, mask=touched, other=0.0)
        m = m + (1.0 - beta1).to(COMPUTE) * (g - m)
        tl.store(exp_avg, m, mask=touched)
    exp_avg_sq = tl.load(lists + 4 * n + tensor).to(tl.pointer_type(COMPUTE)) + slot
    v = tl.load(exp_avg_sq, mask=touched, other=0.0)
    v = beta2.to(COMPUTE) * v + (1.0 - beta2).to(COMPUTE) * h * h
    tl.store(exp_avg_sq, v, mask=touched)
    if HAS_MAX:
        largest = tl.load(lists + 5 * n + tensor).to(tl.pointer_type(COMPUTE)) + slot
        old = tl.load(largest, mask=touched, other=0.0)
        # As torch.maximum: NaN in either stays.
        v = tl.where((v > old) | (v != v), v, old)
        tl.store(largest, v, mask=touched)
    # Correctly rounded, as in plain torch; Triton's own are approximate.
    if COMPUTE == tl.float64:  # noqa: SIM300 (a constexpr)
        u = rate * inv_bc1 * m / (tl.sqrt(v) * inv_sqrt_bc2 + eps)
    else:
        u = tl.div_rn(rate * inv_bc1 * m, tl.sqrt_rn(v) * inv_sqrt_bc2 + eps)
    if MAX_UPDATE:
        u = _clamp(u, tl.load(hyper + 5).to(COMPUTE) * rate)
    x = x - u
    if STOCHASTIC:
        stored = _round_stochastic(x, _random_bits(tl.load(seed), tl.load(steps + tensor), tensor, entries), TYPE)
    else:
        stored = x.to(TYPE)
    tl.store(param, stored, mask=touched)
    if HAS_MASTER:
        tl.store(master, x, mask=touched)
    if HAS_EMA:
        ema = tl.load(lists + 7 * n + tensor).to(tl.pointer_type(COMPUTE)) + entries
        averaged = touched
        target = x if HAS_MASTER else stored.to(COMPUTE)
        if EMA_FROZEN:
            averaged = valid
            frozen = valid & (bit == 0)
            if HAS_MASTER:
                target = tl.where(frozen, tl.load(master, mask=frozen, other=0.0), target)
            else:
                target = tl.where(frozen, tl.load(param, mask=frozen, other=0.0).to(COMPUTE), target)
        old_ema = tl.load(ema, mask=averaged, other=0.0)
        tl.store(ema, old_ema + tl.load(hyper + 6).to(COMPUTE) * (target - old_ema), mask=averaged)


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
    ema_frozen: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    n = len(params)
    if n == 0:
        return
    device, dtype = params[0].device, params[0].dtype
    numels = [param.numel() for param in params]
    chunks = Chunks(numels, BLOCK, device)
    if chunks.count == 0:
        return
    columns = (params, grads, masked_grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts)
    lists = addresses([t for column in columns for t in (column or [None] * n)], device)
    joint = len(masked_grads) > 0
    masked = words is not None and not joint
    blocks, first_blocks = 0, []
    for numel in numels:
        first_blocks.append(blocks)
        blocks += -(-numel // PACK_BLOCK)
    hyper = (
        beta1,
        beta2,
        eps,
        weight_decay,
        0.0 if clip_value is None else clip_value,
        0.0 if max_update is None else max_update,
        0.0 if ema_decay is None else 1.0 - ema_decay,
    )
    unused = lists
    _adam_kernel[(chunks.count,)](
        lists,
        n,
        chunks.table,
        steps,
        lr,
        numbers(hyper, torch.float64, device),
        bias_table if counts else unused,
        bias_table.shape[0] if counts else 1,
        words if words is not None else unused,
        numbers(list(word_offsets)[:n], torch.int64, device) if words is not None else unused,
        packed_offsets if packed_offsets is not None else unused,
        numbers(first_blocks, torch.int64, device) if packed_offsets is not None else unused,
        grad_scale if grad_scale is not None else unused,
        found_inf if found_inf is not None else unused,
        numbers([seed], torch.int64, device) if stochastic_rounding else unused,
        TYPE=TYPES[dtype],
        COMPUTE=tl.float64 if dtype == torch.float64 else tl.float32,
        COUNT=tl.int16 if counts and counts[0].dtype == torch.int16 else tl.int32,
        MASKED=masked,
        JOINT=joint,
        HAS_WORDS=words is not None,
        PACKED=packed_offsets is not None,
        HAS_M=len(exp_avgs) > 0,
        HAS_MAX=len(max_exp_avg_sqs) > 0,
        HAS_MASTER=len(masters) > 0,
        HAS_EMA=len(emas) > 0,
        HAS_COUNTS=len(counts) > 0,
        COUNT_MAX=torch.iinfo(counts[0].dtype).max if counts else 0,
        HAS_SCALE=grad_scale is not None,
        HAS_FOUND_INF=found_inf is not None,
        COUPLED=weight_decay != 0 and not decoupled_weight_decay,
        DECOUPLED=weight_decay != 0 and decoupled_weight_decay,
        MAXIMIZE=maximize,
        CLIP=clip_value is not None,
        MAX_UPDATE=max_update is not None,
        RETAIN=retain_variance,
        ZERO_NONFINITE=zero_nonfinite,
        EMA_FROZEN=masked and ema_frozen,
        STOCHASTIC=stochastic_rounding and not masters and dtype in (torch.bfloat16, torch.float16),
        BLOCK=BLOCK,
        PACK_BLOCK=PACK_BLOCK,
        num_warps=WARPS,
    )
