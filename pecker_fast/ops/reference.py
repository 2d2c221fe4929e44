"""The operators in plain torch: their definitions, which run on any device of torch.

Every other back end is tested against this file. It favours the equation over speed, but like all back ends it never
concatenates the tensors and never sorts them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import (
    INF_KEY,
    PACK_BLOCK,
    RADIX_BITS,
    SUM_COLUMNS,
    SUM_WINDOWS,
    ZERO_KEY,
    num_blocks,
    num_words,
    radix_shift,
)
from .radix_select import radix_select

_CHUNK = 1 << 20  # entries handled at a time, which bounds the memory of temporaries


def magnitude_keys(x: Tensor) -> Tensor:
    """int32 keys of a floating tensor, flattened: float32 bits without the sign. Monotone in the magnitude."""
    return x.reshape(-1).to(torch.float32).view(torch.int32) & 0x7FFFFFFF


def pack_bits(bits: Tensor) -> Tensor:
    """Mask words, int32 [num_words(n)], of a bool tensor [n]: bit i of word w is entry 32 w + i."""
    width = num_words(bits.numel())
    padded = torch.zeros(width * 32, dtype=torch.uint8, device=bits.device)
    padded[: bits.numel()] = bits.reshape(-1)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bits.device)
    # Little-endian: byte j of a word holds its bits 8 j to 8 j + 7.
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8).view(torch.int32)


def unpack_bits(words: Tensor, numel: int) -> Tensor:
    """The inverse of ``pack_bits``: bool [numel]."""
    if numel == 0:
        # An empty tensor may have stride 0, and then has no view of another dtype.
        return torch.zeros(0, dtype=torch.bool, device=words.device)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=words.device)
    octets = words[: num_words(numel)].contiguous().view(torch.uint8)
    return ((octets.unsqueeze(1) & weights) != 0).view(-1)[:numel]


def quotients(scores: Tensor, others: Tensor, damping: Tensor) -> Tensor:
    """|scores| / max(|others| + damping, 2 ** -126), in float32.

    2 ** -126 is the smallest normal float32. Sum and quotient are rounded to nearest, so every back end that computes
    in IEEE arithmetic gets the same bits. NaN on either side and inf / inf give NaN; 0 / 0 gives 0.
    """
    denominators = others.float().abs() + damping
    smallest = torch.finfo(torch.float32).tiny
    return scores.float().abs() / torch.where(denominators < smallest, smallest, denominators)


def magnitude_sums(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device if tensors else None
    sums = torch.zeros((len(tensors), SUM_COLUMNS), dtype=torch.int64, device=device)
    for index, _, keys in _key_chunks(tensors):
        finite = keys < INF_KEY
        exponents = (keys >> 23).clamp(min=1)
        significands = (keys & 0x7FFFFF) | torch.where(keys >> 23 > 0, 1 << 23, 0)
        values = torch.where(finite, significands.long() << (exponents % 16), 0)
        windows = torch.where(finite, exponents // 16, 0).long()
        sums[index].scatter_add_(0, windows, values & 0xFFFFFFFF)
        sums[index].scatter_add_(0, SUM_WINDOWS + windows, values >> 32)
        sums[index, -1] += finite.sum()
    return sums


def _key_chunks(scores: Sequence[Tensor], relative_to: Sequence[Tensor] | None = None, damping: Tensor | None = None):
    """Yields (index of the tensor, first entry, keys) over all scores in bounded pieces."""
    for index, score in enumerate(scores):
        flat = score.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            values = flat[start : start + _CHUNK]
            if relative_to is not None:
                values = quotients(values, relative_to[index].reshape(-1)[start : start + _CHUNK], damping[index])
            yield index, start, magnitude_keys(values)


def radix_histogram(
    scores: Sequence[Tensor],
    prefixes: Tensor,
    level: int,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
) -> Tensor:
    bins = 1 << RADIX_BITS[level]
    shift = radix_shift(level)
    histogram = torch.zeros((prefixes.shape[0], bins), dtype=torch.int64, device=prefixes.device)
    for _, _, keys in _key_chunks(scores, relative_to, damping):
        eligible = (keys > ZERO_KEY) & (keys <= INF_KEY)
        for row in range(prefixes.shape[0]):
            counted = eligible if level == 0 else eligible & (keys >> (shift + RADIX_BITS[level]) == prefixes[row])
            digits = (keys >> shift) & (bins - 1)
            histogram[row].scatter_add_(0, digits.long(), counted.long())
    return histogram


def threshold_mask(
    scores: Sequence[Tensor],
    keys: Tensor,
    tie_limits: Tensor,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = keys.shape[0]
    device = keys.device
    words = torch.empty((m, sum(num_words(score.numel()) for score in scores)), dtype=torch.int32, device=device)
    counts = torch.zeros(m, dtype=torch.int64, device=device)
    ties_seen = torch.zeros(m, dtype=torch.int64, device=device)
    smallest = torch.full((m,), INF_KEY, dtype=torch.int32, device=device)
    nan_count = torch.zeros((), dtype=torch.int64, device=device)
    position = 0
    for _, _, chunk in _key_chunks(scores, relative_to, damping):
        width = num_words(chunk.numel())
        nan_count += (chunk > INF_KEY).sum()
        for row in range(m):
            ties = chunk == keys[row]
            kept_ties = ties & (ties.cumsum(0) + ties_seen[row] <= tie_limits[row])
            ties_seen[row] += ties.sum()
            kept = ((chunk > keys[row]) & (chunk <= INF_KEY)) | kept_ties
            counts[row] += kept.sum()
            smallest[row] = torch.minimum(smallest[row], torch.where(kept, chunk, INF_KEY).amin())
            words[row, position : position + width] = pack_bits(kept)
        position += width
    return words, smallest.view(torch.float32), counts, nan_count


def select(
    scores: Sequence[Tensor],
    ks: Tensor,
    ties_all: bool = False,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def histogram(prefixes: Tensor, level: int) -> Tensor:
        return radix_histogram(scores, prefixes, level, relative_to, damping)

    keys, tie_limits = radix_select(histogram, ks, ties_all)
    return threshold_mask(scores, keys, tie_limits, relative_to, damping)


def block_counts(words: Tensor, word_offsets: Sequence[int], numels: Sequence[int]) -> Tensor:
    counts = []
    for offset, numel in zip(word_offsets, numels, strict=False):
        bits = unpack_bits(words[offset : offset + num_words(numel)], numel)
        padded = torch.zeros(num_blocks(numel) * PACK_BLOCK, dtype=torch.bool, device=words.device)
        padded[:numel] = bits
        counts.append(padded.view(-1, PACK_BLOCK).sum(dim=1))
    return torch.cat(counts) if counts else words.new_empty(0, dtype=torch.int64)


def pack(dense: Tensor, words: Tensor, count: int) -> Tensor:
    packed = dense.reshape(-1)[unpack_bits(words, dense.numel())]
    if packed.numel() != count:
        raise ValueError(f"count is {count}, but the mask has {packed.numel()} entries")
    return packed


def unpack(packed: Tensor, words: Tensor, numel: int) -> Tensor:
    dense = packed.new_zeros(numel)
    # Not by assignment: that turns a single value into a Python number, which loses the payload of a NaN.
    return dense.masked_scatter_(unpack_bits(words, numel), packed)


def apply_mask_(tensors: Sequence[Tensor], words: Tensor, word_offsets: Sequence[int]) -> None:
    for tensor, offset in zip(tensors, word_offsets, strict=False):
        tensor.view(-1)[~unpack_bits(words[offset:], tensor.numel())] = 0


def accumulate_(accumulators: Sequence[Tensor], grads: Sequence[Tensor], reduce: str) -> None:
    for accumulator, grad in zip(accumulators, grads, strict=True):
        value = grad.to(accumulator.dtype)
        if reduce == "abs_sum":
            value = value.abs()
        elif reduce == "sq_sum":
            value = value.square()
        accumulator.view(-1).add_(value.reshape(-1))


def _combined(grad, masked_grad, bits, inv_scale, dtype, like):
    """(g, g_r): the gradient of the step and p.grad's part of it, flat, unscaled, in the compute dtype."""
    own = torch.zeros(like.numel(), dtype=dtype, device=like.device)
    if grad is not None:
        own = grad.reshape(-1).to(dtype) * inv_scale if inv_scale is not None else grad.reshape(-1).to(dtype)
    if masked_grad is None:
        return own, own
    masked = masked_grad.reshape(-1).to(dtype)
    if inv_scale is not None:
        masked = masked * inv_scale
    if bits is not None:
        masked = torch.where(bits, masked, 0)
    return own + masked, own


def count_nonfinite(grads, masked_grads, words, word_offsets, grad_scale=None):
    joint = len(masked_grads) > 0
    total = None
    for i, grad in enumerate(grads):
        masked_grad = masked_grads[i] if joint else None
        like = grad if grad is not None else masked_grad
        if like is None:
            continue
        dtype = compute_dtype(like.dtype)
        bits = None if words is None else unpack_bits(words[word_offsets[i] :], like.numel())
        inv_scale = None if grad_scale is None else 1.0 / grad_scale.to(dtype)
        g, _ = _combined(grad, masked_grad, bits, inv_scale, dtype, like)
        bad = ~g.isfinite()
        if bits is not None and not joint:
            bad &= bits
        total = bad.sum() if total is None else total + bad.sum()
    if total is None:
        total = torch.zeros((), dtype=torch.int64, device=words.device if words is not None else None)
    return total


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which the operators do arithmetic on parameters of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_packed(tensors: Sequence[Tensor | None], params: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor]) -> bool:
    """Whether a list of a packed step holds the salient entries only: as many as the packed moments, and not as many as
    the parameters. With a mask of all entries there is no difference."""
    trios = zip(tensors, params, exp_avg_sqs, strict=False)
    sizes = [(t.numel(), param.numel(), v.numel()) for t, param, v in trios if t is not None]
    return all(size == salient for size, _, salient in sizes) and any(size != numel for size, numel, _ in sizes)


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
) -> None:
    """One Adam step over all tensors.

    The kind of step follows from the arguments. Without ``words`` every entry is updated (with g = grad + masked_grad
    if there are ``masked_grads``). With ``words`` and no ``masked_grads`` it is a masked step: entries outside the
    mask keep parameter, moments and count bit for bit. With both it is a joint step: every entry is updated, with
    g = grad + (masked_grad where the mask is set, else 0).

    Per entry, in this order, in float32 (float64 for float64 parameters):

        g_r  = grad / grad_scale                                  (0 where grad is None)
        g    = g_r + (masked_grad / grad_scale where salient)
        g, g_r -> 0 where not finite                              (zero_nonfinite)
        g, g_r clamped to +- clip_value, NaN stays NaN            (clip_value)
        g, g_r negated                                            (maximize)
        x    = master if there is one, else param
        x   *= 1 - lr weight_decay                                (decoupled) | g, g_r += weight_decay x
        m    = m + (1 - beta1) (g - m)                            (beta1 == 0: m = g, no first moment is stored)
        v    = beta2 v + (1 - beta2) h h                          h = g_r if retain_variance else g
        vmax = max(vmax, v), used in place of v below             (max_exp_avg_sqs)
        u    = lr (m / bc1) / (sqrt(v) / sqrt(bc2) + eps)         bc = 1 - beta ** step   (Kingma & Ba, Algorithm 1)
        u clamped to +- max_update lr                             (max_update)
        x   -= u;  master = x;  param = x rounded
        ema += (1 - ema_decay) (y - ema)                          y = master if there is one, else the stored param

    Arguments
    ---------
    params: dtype P, all of one of float32, bfloat16, float16, float64. grads, masked_grads: the same dtype, or None.
    exp_avgs (empty list: beta1 == 0), exp_avg_sqs, max_exp_avg_sqs (empty list: no amsgrad), masters (empty list:
    none), emas (empty list: none): the compute dtype. masked_grads may be an empty list.
    counts: int16 or int32 per entry (empty list: all entries of a tensor share steps[i]). With counts, an updated
        entry first gets c = min(c + 1, largest value of the dtype) and its corrections are row min(c, M) of
        ``bias_table`` [M + 1, 2], compute dtype: 1 / bc1 and 1 / sqrt(bc2); row 0 is never used.
    steps: float32 [len(params)], this step already counted. lr: float64, 0-dim, on the parameters' device.
    packed_offsets: int64, one per PACK_BLOCK of every tensor: the number of salient entries of the same tensor before
        that block. If present, exp_avgs, exp_avg_sqs, max_exp_avg_sqs and counts hold the salient entries only, in
        order. Only for masked steps. grads, and masters and emas together, may be packed as well; their sizes tell.
    grad_scale: float32 0-dim. found_inf: float32 0-dim; if it is not 0, nothing is changed.
    ema_everywhere: in a masked step, update the EMA of entries outside the mask too. Without it their EMA does not
        change, which is right only if it equals the parameter.
    stochastic_rounding: P = bfloat16 or float16 without masters: x is rounded up or down with probabilities that make
        the expectation exact, by ``random_bits`` of (seed, steps[i], tensor_numbers[i], entry): reproducible, equal on
        all back ends. tensor_numbers: the numbers of the tensors among all that share a seed; empty: 0, 1, 2 ...
    """
    if found_inf is not None and bool(found_inf != 0):
        return
    joint = len(masked_grads) > 0
    masked = words is not None and not joint
    packed = packed_offsets is not None
    packed_grads, packed_masters, packed_emas = (
        packed and is_packed(tensors, params, exp_avg_sqs) for tensors in (grads, masters, emas)
    )
    for i, param in enumerate(params):
        numel = param.numel()
        grad = grads[i]
        masked_grad = masked_grads[i] if joint else None
        if numel == 0 or (grad is None and masked_grad is None):
            continue
        dtype = compute_dtype(param.dtype)
        rate = lr.to(dtype)
        bits = None if words is None else unpack_bits(words[word_offsets[i] :], numel)
        inv_scale = None if grad_scale is None else 1.0 / grad_scale.to(dtype)
        g, g_r = _combined(grad, masked_grad, bits, inv_scale, dtype, grad if packed_grads else param)

        # Everything below works on the entries to update only: `take` reads them, `put` writes them back.
        def take(t, bits=bits if masked else None):
            return t.view(-1) if bits is None else t.view(-1)[bits]

        def put(t, value, bits=bits if masked else None):
            if bits is None:
                t.view(-1).copy_(value)
            else:
                t.view(-1)[bits] = value.to(t.dtype)

        take_all = lambda t: t.view(-1)  # noqa: E731
        put_all = lambda t, value: t.view(-1).copy_(value)  # noqa: E731
        take_state, put_state = (take_all, put_all) if packed else (take, put)
        take_master, put_master = (take_all, put_all) if packed_masters else (take, put)
        if not packed_grads:
            g, g_r = take(g), take(g_r)
        if zero_nonfinite:
            g, g_r = torch.where(g.isfinite(), g, 0), torch.where(g_r.isfinite(), g_r, 0)
        if clip_value is not None:
            g, g_r = g.clamp(-clip_value, clip_value), g_r.clamp(-clip_value, clip_value)
        if maximize:
            g, g_r = -g, -g_r
        x = take_master(masters[i]) if masters else take(param).to(dtype)
        if weight_decay != 0:
            if decoupled_weight_decay:
                x = x * (1 - rate * weight_decay)
            else:
                g, g_r = g + weight_decay * x, g_r + weight_decay * x
        if counts:
            top = torch.iinfo(counts[i].dtype).max
            count = (take_state(counts[i]).to(torch.int64) + 1).clamp(max=top)
            put_state(counts[i], count)
            inv_bc1, inv_sqrt_bc2 = bias_table[count.clamp(max=bias_table.shape[0] - 1)].unbind(1)
        else:
            step = steps[i].to(torch.float64)
            inv_bc1 = (1 / (1 - beta1**step)).to(dtype)
            inv_sqrt_bc2 = (1 / (1 - beta2**step).sqrt()).to(dtype)
        m = g
        if exp_avgs:
            m = take_state(exp_avgs[i])
            m = m + (1 - beta1) * (g - m)
            put_state(exp_avgs[i], m)
        h = g_r if retain_variance else g
        v = beta2 * take_state(exp_avg_sqs[i]) + (1 - beta2) * h * h
        put_state(exp_avg_sqs[i], v)
        if max_exp_avg_sqs:
            v = torch.maximum(take_state(max_exp_avg_sqs[i]), v)
            put_state(max_exp_avg_sqs[i], v)
        u = rate * inv_bc1 * m / (v.sqrt() * inv_sqrt_bc2 + eps)
        if max_update is not None:
            u = u.clamp(-max_update * rate, max_update * rate)
        x = x - u
        if masters:
            put_master(masters[i], x)
        if stochastic_rounding and not masters and param.dtype in (torch.bfloat16, torch.float16):
            index = torch.arange(numel, device=param.device)
            number = tensor_numbers[i] if tensor_numbers else i
            put(param, round_stochastic(x, param.dtype, random_bits(seed, steps[i], number, take(index))))
        else:
            put(param, x)
        if packed_emas:
            target = masters[i].view(-1) if masters else take(param).to(dtype)
            emas[i].view(-1).add_((1 - ema_decay) * (target - emas[i].view(-1)))
        elif emas:
            target = (masters[i] if masters else param).view(-1).to(dtype)
            ema = emas[i].view(-1)
            if masked and not ema_everywhere:
                ema[bits] += (1 - ema_decay) * (target[bits] - ema[bits])
            else:
                ema += (1 - ema_decay) * (target - ema)


_U32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on uint32 values held in int64: each output bit depends on every input bit."""
    x = x ^ (x >> 16)
    x = _multiply_u32(x, 0x85EBCA6B)
    x = x ^ (x >> 13)
    x = _multiply_u32(x, 0xC2B2AE35)
    return x ^ (x >> 16)


def _multiply_u32(x: Tensor, factor: int) -> Tensor:
    # In two halves: the product of two 32-bit numbers would overflow int64.
    return (x * (factor & 0xFFFF) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & _U32


def random_bits(seed: int, step: Tensor, tensor: int, entry: Tensor) -> Tensor:
    """uint32 values (held in int64) for stochastic rounding: a hash of seed, step count, tensor number and entry.

    h = mix(seed_low ^ mix(seed_high + 0x9E3779B9)); h = mix(h ^ step); h = mix(h ^ tensor); h = mix(h ^ entry_high);
    result = mix(h ^ entry_low), all on uint32 with ``mix`` the MurmurHash3 finaliser.
    """
    as_tensor = lambda value: torch.as_tensor(value & _U32, dtype=torch.int64, device=entry.device)  # noqa: E731
    state = _mix(as_tensor(seed) ^ _mix(as_tensor((seed >> 32) + 0x9E3779B9)))
    state = _mix(state ^ step.to(torch.int64))
    state = _mix(state ^ as_tensor(tensor))
    state = _mix(state ^ (entry >> 32))
    return _mix(state ^ (entry & _U32))


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float32 ``x`` to bfloat16 or float16, up or down with probability proportional to the distance.

    Random bits are added below the last kept bit of the magnitude, then the magnitude is truncated. inf and NaN pass
    through; a value beyond the largest finite one becomes inf. Subnormal float16 results use their fixed spacing.
    """
    raw = x.view(torch.int32)
    if dtype == torch.bfloat16:
        low = 0xFFFF
        rounded = ((raw + (bits & low).to(torch.int32)) & ~low).view(torch.float32)
    else:
        low = 0x1FFF
        normal = ((raw + (bits & low).to(torch.int32)) & ~low).view(torch.float32)
        # Below 2^-14 float16 values are 2^-24 apart: 13 random bits as a fraction of that spacing.
        steps = torch.floor(x.abs() * 2.0**24 + (bits & low).to(torch.float32) * 2.0**-13)
        subnormal = torch.copysign(steps * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, subnormal, normal)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def bias_correction_rows(beta1: float, beta2: float, dtype: torch.dtype) -> int:
    """Number of steps after which both bias corrections are 1 in ``dtype``: the last row that a bias table needs."""
    largest = max(beta1, beta2)
    if largest == 0:
        return 1
    digits = 26 if dtype == torch.float32 else 55
    return math.ceil(-digits * math.log(2) / math.log(largest))


def bias_table(beta1: float, beta2: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[M + 1, 2]: 1 / (1 - beta1 ** c) and 1 / sqrt(1 - beta2 ** c) of c = 0 ... M, where both have become 1."""
    count = torch.arange(bias_correction_rows(beta1, beta2, dtype) + 1, dtype=torch.float64)
    count[0] = 1  # never read; keeps the row finite
    table = torch.stack([1 / (1 - beta1**count), 1 / (1 - beta2**count).sqrt()], dim=1)
    return table.to(dtype=dtype, device=device)
