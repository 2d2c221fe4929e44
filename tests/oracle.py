"""Independent definitions of the package's computations: numpy, float64, a full stable sort, one formula a line.

They share no code with the package. ``test_oracle.py`` checks them against cases worked out by hand.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

# ---- masks


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Exact: bfloat16 and float16 become float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def pack_words(bits: np.ndarray) -> np.ndarray:
    """int32 words of one tensor's bools: bit i of word w is entry 32 w + i."""
    flat = np.asarray(bits, dtype=bool).reshape(-1)
    words = np.zeros(-(-flat.size // 32), dtype=np.uint32)
    for entry in np.flatnonzero(flat):
        words[entry // 32] |= np.uint32(1) << np.uint32(entry % 32)
    return words.view(np.int32)


def pack_words_fast(bits: np.ndarray) -> np.ndarray:
    """``pack_words`` for large tensors."""
    octets = np.packbits(np.asarray(bits, dtype=bool).reshape(-1), bitorder="little")
    return np.concatenate([octets, np.zeros(-octets.size % 4, dtype=np.uint8)]).view("<i4")


def all_words(masks: list[np.ndarray]) -> np.ndarray:
    """Words of several tensors, each starting on a word."""
    return np.concatenate([np.zeros(0, np.int32), *(pack_words_fast(mask) for mask in masks)])


@dataclass
class Selection:
    """``masks``: bool arrays, flat, one for each tensor."""

    masks: list[np.ndarray]
    threshold: float
    count: int
    nan_count: int


def _split(flat: np.ndarray, tensors: list[Tensor]) -> list[np.ndarray]:
    ends = np.cumsum([t.numel() for t in tensors])
    return np.split(flat, ends[:-1]) if tensors else []


def _magnitudes(tensors: list[Tensor]) -> np.ndarray:
    parts = [np.abs(to_numpy(t).astype(np.float32).astype(np.float64)).reshape(-1) for t in tensors]
    return np.concatenate([np.zeros(0), *parts])


def _selection(selected: np.ndarray, magnitudes: np.ndarray, tensors: list[Tensor]) -> Selection:
    threshold = float(magnitudes[selected].min()) if selected.any() else float("inf")
    return Selection(_split(selected, tensors), threshold, int(selected.sum()), int(np.isnan(magnitudes).sum()))


def select(tensors: list[Tensor], k: int, ties_all: bool = False) -> Selection:
    """The k largest magnitudes by a full stable sort."""
    return selections(tensors, [k], ties_all)[0]


def selections(tensors: list[Tensor], ks: list[int], ties_all: bool = False) -> list[Selection]:
    """``select`` for each of ``ks``; the sort is the same for all."""
    magnitudes = _magnitudes(tensors)
    eligible = np.flatnonzero(magnitudes > 0)  # NaN compares false
    ranking = eligible[np.argsort(-magnitudes[eligible], kind="stable")]
    results = []
    for k in ks:
        ranked = ranking[:k]
        selected = np.zeros(magnitudes.size, dtype=bool)
        selected[ranked] = True
        if ties_all and ranked.size:
            selected |= magnitudes >= magnitudes[ranked[-1]]
        results.append(_selection(selected, magnitudes, tensors))
    return results


def keep_at_least(tensors: list[Tensor], threshold: float, ties: int | None = None) -> Selection:
    """Every entry above ``threshold``, and the first ``ties`` (None: all) of those at it."""
    magnitudes = _magnitudes(tensors)
    at = np.flatnonzero((magnitudes == threshold) & (magnitudes > 0))
    selected = magnitudes > threshold
    selected[at[: len(at) if ties is None else ties]] = True
    return _selection(selected, magnitudes, tensors)


def quotients(scores: list[Tensor], others: list[Tensor], damping: float) -> list[Tensor]:
    """|s| / (|r| + damping * mean |r|) in float32, the mean over a tensor's finite entries; no denominator is 0."""
    made = []
    for score, other in zip(scores, others, strict=True):
        s, r = (np.abs(to_numpy(t)).astype(np.float32) for t in (score, other))
        finite = r[np.isfinite(r)].astype(np.float64)
        mean = math.fsum(finite) / max(finite.size, 1)
        with np.errstate(all="ignore"):
            denominators = r + np.float32(damping * mean)
            denominators = np.where(denominators < np.float32(2.0**-126), np.float32(2.0**-126), denominators)
            made.append(torch.from_numpy(np.asarray(s / denominators)))
    return made


def exact_sum(tensor: Tensor) -> Fraction:
    """Exact sum of the finite entries' magnitudes, of float32 at most: for each exponent the integers of 24 bits that
    stand before it."""
    values = np.abs(to_numpy(tensor).astype(np.float32)).reshape(-1)
    significands, exponents = np.frexp(values[np.isfinite(values)].astype(np.float64))
    integers = (significands * 2.0**24).astype(np.int64)
    return sum((int(integers[exponents == e].sum()) * Fraction(2) ** (int(e) - 24) for e in np.unique(exponents)),
               Fraction(0))  # fmt: skip


def histogram(tensors: list[Tensor], prefix: int, level: int) -> np.ndarray:
    """Counts by the next 11, 10 or 10 bits of the keys whose higher bits are ``prefix``."""
    magnitudes = _magnitudes(tensors)
    keys = magnitudes[magnitudes > 0].astype(np.float32).view(np.uint32).astype(np.int64)
    above, bits = [(31, 11), (20, 10), (10, 10)][level]
    if level > 0:
        keys = keys[keys >> above == prefix]
    return np.bincount((keys >> (above - bits)) % (1 << bits), minlength=1 << bits)


# ---- Adam


@dataclass
class AdamOptions:
    """Names and meanings are those of ``masked_adam_``."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False
    clip_value: float | None = None
    max_update: float | None = None
    retain_variance: bool = False
    zero_nonfinite: bool = False
    grad_scale: float | None = None
    ema_decay: float | None = None


@dataclass
class AdamState:
    """One parameter, flat, before or after a step. ``step``: int array, updates that each entry has had."""

    x: np.ndarray
    exp_avg_sq: np.ndarray
    step: np.ndarray
    exp_avg: np.ndarray | None = None
    max_exp_avg_sq: np.ndarray | None = None
    updated: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


def _clamp(value: np.ndarray, limit: float) -> np.ndarray:
    """NaN stays NaN."""
    return np.where(value > limit, limit, np.where(value < -limit, -limit, value))


def adam_step(
    state: AdamState,
    grad: np.ndarray | None,
    masked_grad: np.ndarray | None,
    mask: np.ndarray | None,
    joint: bool,
    options: AdamOptions,
    dtype: type = np.float64,
) -> AdamState:
    """One step of one parameter (DESIGN: unscale, combine, non-finite, clip, maximize, decay, moments, update).

    ``mask`` and not ``joint``: only entries in the mask change, the rest is returned unchanged. In float64 this is the
    truth; in float32 it is the result of plain array code with the same formulas.
    """
    o = options
    as_dtype = lambda value: np.asarray(value, dtype=dtype)  # noqa: E731
    n = state.x.size
    with np.errstate(all="ignore"):
        retain = np.zeros(n, dtype) if grad is None else as_dtype(grad)
        forget = np.zeros(n, dtype) if masked_grad is None else as_dtype(masked_grad)
        if o.grad_scale is not None:
            retain, forget = retain / dtype(o.grad_scale), forget / dtype(o.grad_scale)
        chosen = forget if mask is None else np.where(mask, forget, dtype(0))
        g = retain + chosen if joint else retain
        h = retain if o.retain_variance else g
        if o.zero_nonfinite:
            g, h = np.where(np.isfinite(g), g, dtype(0)), np.where(np.isfinite(h), h, dtype(0))
        if o.clip_value is not None:
            g, h = _clamp(g, dtype(o.clip_value)), _clamp(h, dtype(o.clip_value))
        if o.maximize:
            g, h = -g, -h
        x = as_dtype(state.x)
        lr, eps = dtype(o.lr), dtype(o.eps)
        if o.weight_decay and o.decoupled_weight_decay:
            x = x - lr * dtype(o.weight_decay) * x
        elif o.weight_decay:
            g, h = g + dtype(o.weight_decay) * x, h + dtype(o.weight_decay) * x
        step = state.step + 1
        # Corrections depend on the step count only, and are computed at least in float64, as in torch.
        wide = np.promote_types(dtype, np.float64).type
        correction1 = (1 - wide(o.beta1) ** step.astype(wide)).astype(dtype)
        correction2 = (1 - wide(o.beta2) ** step.astype(wide)).astype(dtype)
        b2 = dtype(o.beta2)
        # As torch does it, by lerp_ and addcmul_.
        m = g if o.beta1 == 0 else as_dtype(state.exp_avg) + dtype(1 - o.beta1) * (g - as_dtype(state.exp_avg))
        v = b2 * as_dtype(state.exp_avg_sq) + dtype(1 - o.beta2) * h * h
        largest = None if state.max_exp_avg_sq is None else np.maximum(as_dtype(state.max_exp_avg_sq), v)
        second = v if largest is None else largest
        update = lr * (m / correction1) / (np.sqrt(second / correction2) + eps)
        if o.max_update is not None:
            update = _clamp(update, dtype(o.max_update) * lr)
        x = x - update
    updated = np.ones(n, bool) if mask is None or joint else np.asarray(mask)
    pick = lambda new, old: None if old is None else np.where(updated, new, as_dtype(old))  # noqa: E731
    return AdamState(
        pick(x, state.x),
        pick(v, state.exp_avg_sq),
        np.where(updated, step, state.step),
        pick(m, state.exp_avg),
        pick(largest, state.max_exp_avg_sq),
        updated,
    )


def adam_scales(
    state: AdamState,
    grad: np.ndarray | None,
    masked_grad: np.ndarray | None,
    options: AdamOptions,
    after: AdamState,
) -> AdamState:
    """Sizes that rounding errors of a step are relative to: sums of magnitudes, so that terms that cancel count."""
    o = options
    with np.errstate(all="ignore"):
        sizes = []
        for part in (grad, masked_grad):
            size = 0.0 if part is None else np.abs(np.asarray(part, np.float64)) / (o.grad_scale or 1.0)
            # inf is clipped to clip_value, or else the result is not finite either.
            sizes.append(np.where(np.isfinite(size), size, o.clip_value or 0.0))
        decay = o.weight_decay * np.abs(state.x)
        g = sizes[0] + sizes[1] + decay
        h = sizes[0] + decay if o.retain_variance else g
        m_old = 0.0 if state.exp_avg is None else np.abs(state.exp_avg)
        m = o.beta1 * m_old + (1 - o.beta1) * g
        v = state.exp_avg_sq + (1 - o.beta2) * h * h
        largest = None if state.max_exp_avg_sq is None else np.maximum(state.max_exp_avg_sq, v)
        second = after.exp_avg_sq if after.max_exp_avg_sq is None else after.max_exp_avg_sq
        correction1, correction2 = 1 - o.beta1**after.step, 1 - o.beta2**after.step
        u = o.lr * m / correction1 / (np.sqrt(second / correction2) + o.eps)
        # If terms of h cancel, the divisor is small and uncertain.
        ratio = (v if largest is None else largest) / np.where(second > 0, second, 1.0)
        u = u * np.sqrt(np.where((ratio > 1) & np.isfinite(ratio), ratio, 1.0))
        return AdamState(np.abs(state.x) + u, v, after.step, m, largest)


def ema_step(ema: np.ndarray, x: np.ndarray, decay: float, dtype: type = np.float64) -> np.ndarray:
    """ema + (1 - decay) (x - ema)."""
    with np.errstate(all="ignore"):
        ema, x = np.asarray(ema, dtype), np.asarray(x, dtype)
        return ema + dtype(1 - decay) * (x - ema)


def nonfinite(grad, masked_grad, mask, joint: bool, scale: float | None) -> int:
    """Entries of one parameter whose gradient is inf or NaN, of those that a step updates."""
    present = grad if grad is not None else masked_grad
    if present is None:
        return 0
    with np.errstate(all="ignore"):
        total = np.zeros(present.size, present.dtype)
        for part, where in ((grad, None), (masked_grad, mask)):
            if part is not None:
                part = part if scale is None else part / present.dtype.type(scale)
                total = total + (part if where is None else np.where(where, part, 0))
    bad = ~np.isfinite(total)
    return int((bad if mask is None or joint else bad & mask).sum())


# ---- stochastic rounding


def _murmur_mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def random_u32(seed: int, step: int, tensor: int, entry: int) -> int:
    """The random bits of one entry: MurmurHash3's finaliser chained over seed, step, tensor number and entry."""
    seed %= 2**64
    h = _murmur_mix(seed % 2**32 ^ _murmur_mix((seed // 2**32 + 0x9E3779B9) % 2**32))
    for value in (step, tensor, entry // 2**32, entry % 2**32):
        h = _murmur_mix(h ^ value)
    return h


def round_stochastic(x: float, dtype: torch.dtype, random: int) -> float:
    """``x`` (a float32 value) to one of its two neighbours in ``dtype``: away from zero where the dropped part of the
    significand and ``random`` overflow it."""
    if not np.isfinite(x) or x == 0:
        return x
    bits, lowest = (16, -133) if dtype == torch.bfloat16 else (13, -24)
    mantissa = 8 if dtype == torch.bfloat16 else 11
    exponent = max(int(np.frexp(abs(x))[1]) - mantissa, lowest)  # spacing 2 ** exponent
    in_units = abs(x) / 2.0**exponent
    low = int(np.floor(in_units))
    fraction = in_units - low
    value = (low + (1 if fraction + (random % 2**bits) / 2**bits >= 1 else 0)) * 2.0**exponent
    return float(np.copysign(value if value <= float(torch.finfo(dtype).max) else np.inf, x))
