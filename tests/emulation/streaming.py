"""The streaming kernels of csrc/cuda on CPU tensors, with the operators' signatures, run by the emulator."""

import ctypes
import math
from contextlib import contextmanager

import torch

from pecker_fast.ops import checks, reference
from pecker_fast.ops.layout import num_blocks

from .library import load

KERNELS = (
    "multi_tensor",
    "adam_prepare",
    "adam_f32",
    "adam_bf16",
    "adam_fp16",
    "adam_f64",
    "pointwise",
    "packing",
)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_REDUCTIONS = {"sum": 0, "abs_sum": 1, "sq_sum": 2}


def library() -> ctypes.CDLL:
    lib = load("streaming", KERNELS)
    lib.last_error.restype = lib.launched.restype = ctypes.c_char_p
    return lib


def launched() -> list[str]:
    """The kernels launched since the last call, and "memset", in order."""
    return library().launched().decode().split()


@contextmanager
def unreadable(tensors):
    """Within this context a kernel that reads one of the tensors raises."""
    for tensor in tensors:
        if tensor.nbytes:
            begin = tensor.data_ptr()
            library().forbid_reads(ctypes.c_int64(begin), ctypes.c_int64(begin + tensor.nbytes))
    try:
        yield
    finally:
        library().forbid_reads(ctypes.c_int64(0), ctypes.c_int64(0))


def replay() -> None:
    """Runs the step that was recorded by ``masked_adam_(..., tables="capture")``."""
    _run("replay")


def forget_tables() -> None:
    """Empties the cache of tables, and drops the recorded step."""
    library().forget_tables()


def set_order(order: str) -> None:
    """Order in which blocks and threads run: "forward", "reverse" or "shuffled"."""
    library().set_order(("forward", "reverse", "shuffled").index(order))


@contextmanager
def approximate():
    """Within this context arithmetic is as inexact as a GPU's may be."""
    library().set_approximate(1)
    try:
        yield
    finally:
        library().set_approximate(0)


def _int64(values):
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def _int32(values):
    return (ctypes.c_int * max(len(values), 1))(*values)


def _pointer(tensor) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _void(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _run(name, *args):
    lib = library()
    if getattr(lib, name)(*args):
        raise RuntimeError(lib.last_error().decode())


def _table(tensors, lists, offsets=None):
    """numels, word offsets, types, element sizes and pointers of a call; `tensors` give the sizes and types."""
    n = len(tensors)
    pointers = [_pointer(t) for tensors_of_slot in lists for t in (tensors_of_slot or [None] * n)]
    return (
        n,
        _int64([t.numel() for t in tensors]),
        _int64(list(offsets)[:n] if offsets else [0] * n),
        _int32([_TYPES.get(t.dtype, 0) for t in tensors]),
    ), _int64(pointers)


def accumulate_(accumulators, grads, reduce):
    checks.accumulate_(accumulators, grads, reduce)
    table, pointers = _table(grads, [accumulators, grads])
    sizes = _int32([a.element_size() for a in accumulators])
    _run("emulated_accumulate", *table, sizes, pointers, _REDUCTIONS[reduce])


def apply_mask_(tensors, words, word_offsets):
    checks.apply_mask_(tensors, words, word_offsets)
    table, pointers = _table(tensors, [tensors], word_offsets)
    _run("emulated_apply_mask", *table, _int32([t.element_size() for t in tensors]), pointers, _void(words))


def count_nonfinite(grads, masked_grads, words, word_offsets, grad_scale=None):
    checks.count_nonfinite(grads, masked_grads, words, word_offsets, grad_scale)
    joint = len(masked_grads) > 0
    masked = masked_grads if joint else [None] * len(grads)
    pairs = [(g, f, o) for g, f, o in zip(grads, masked, word_offsets or [0] * len(grads), strict=False)]
    pairs = [pair for pair in pairs if pair[0] is not None or pair[1] is not None]
    like = [g if g is not None else f for g, f, _ in pairs]
    table, pointers = _table(like, [[g for g, _, _ in pairs], [f for _, f, _ in pairs]], [o for _, _, o in pairs])
    total = torch.zeros((), dtype=torch.int64)
    sizes = _int32([t.element_size() for t in like])
    _run(
        "emulated_count_nonfinite",
        *table,
        sizes,
        pointers,
        0,
        _void(words),
        int(joint),
        _void(grad_scale),
        _void(total),
    )
    return total


def block_counts(words, word_offsets, numels):
    checks.block_counts(words, word_offsets, numels)
    counts = torch.full((sum(map(num_blocks, numels)),), -1, dtype=torch.int64)
    n = len(numels)
    _run(
        "emulated_block_counts", n, _int64(numels), _int64(list(word_offsets)[:n]), _int32([0] * n), _void(words),
        _void(counts),
    )  # fmt: skip
    return counts


def pack(dense, words, count):
    checks.pack(dense, words, count)
    packed = dense.new_full((count,), 77)
    numel = ctypes.c_int64(dense.numel())
    _run("emulated_pack", _void(dense), dense.element_size(), _void(words), numel, _void(packed), ctypes.c_int64(count))
    return packed


def unpack(packed, words, numel):
    checks.unpack(packed, words, numel)
    dense = packed.new_full((numel,), 77)
    count = ctypes.c_int64(packed.numel())
    _run(
        "emulated_unpack",
        _void(packed),
        packed.element_size(),
        count,
        _void(words),
        ctypes.c_int64(numel),
        _void(dense),
    )
    return dense


class _AdamOptions(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in (
            "words", "packed_offsets", "bias_table", "steps", "lr", "grad_scale", "found_inf")]
        + [(name, ctypes.c_int64) for name in ("last_bias_row", "seed")]
        + [(name, ctypes.c_double) for name in (
            "beta1", "beta2", "eps", "weight_decay", "clip_value", "max_update", "ema_decay")]
        + [(name, ctypes.c_int) for name in (
            "decoupled", "maximize", "retain", "zero_nonfinite", "ema_everywhere", "stochastic", "joint",
            "counts_are_16_bit", "rare", "packed_grads", "packed_values")]
    )  # fmt: skip


def masked_adam_(
    params, grads, masked_grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts, steps, lr, bias_table,
    words, word_offsets, packed_offsets, grad_scale, found_inf, *, beta1, beta2, eps, weight_decay=0.0,
    decoupled_weight_decay=False, maximize=False, clip_value=None, max_update=None, retain_variance=False,
    zero_nonfinite=False, ema_decay=None, ema_everywhere=False, stochastic_rounding=False, seed=0, tensor_numbers=(),
    rare=None, tables="new",
):  # fmt: skip
    """``rare``: run the larger version of the kernel even if no rare feature needs it.

    tables: "new": made for this call; "cached": as the extension does; "capture": the same while a CUDA graph is
    captured, so that the step is recorded and not run. Keep all tensors until it is replayed.
    """
    state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts)
    checks.masked_adam_(
        params, grads, masked_grads, *state, steps, lr, bias_table, words, word_offsets, packed_offsets, grad_scale,
        found_inf, beta1=beta1, beta2=beta2, eps=eps, ema_decay=ema_decay, tensor_numbers=tensor_numbers,
    )  # fmt: skip
    joint, packed = len(masked_grads) > 0, packed_offsets is not None
    n = len(params)
    slots = [params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts, None, None, grads, masked_grads]
    table, pointers = _table(params, slots, word_offsets)
    for i in range(n):
        pointers[7 * n + i] = exp_avg_sqs[i].numel()
        pointers[8 * n + i] = tensor_numbers[i] if tensor_numbers else i
    stochastic = stochastic_rounding and not masters and params[0].dtype in (torch.bfloat16, torch.float16)
    frozen = ema_everywhere and words is not None and not joint and len(emas) > 0
    needed = bool(max_exp_avg_sqs or masters or counts or (joint and retain_variance) or stochastic or frozen)
    options = _AdamOptions(
        words=None if words is None else words.data_ptr(),
        packed_offsets=None if packed_offsets is None else packed_offsets.data_ptr(),
        bias_table=None if bias_table is None else bias_table.data_ptr(),
        steps=steps.data_ptr(),
        lr=lr.data_ptr(),
        grad_scale=None if grad_scale is None else grad_scale.data_ptr(),
        found_inf=None if found_inf is None else found_inf.data_ptr(),
        last_bias_row=0 if bias_table is None else bias_table.shape[0] - 1,
        seed=seed,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        clip_value=math.inf if clip_value is None else clip_value,
        max_update=math.inf if max_update is None else max_update,
        ema_decay=ema_decay or 0.0,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
        retain=retain_variance,
        zero_nonfinite=zero_nonfinite,
        ema_everywhere=frozen,
        stochastic=stochastic,
        joint=joint,
        counts_are_16_bit=bool(counts) and counts[0].dtype == torch.int16,
        rare=needed if rare is None else rare,
        packed_grads=packed and reference.is_packed(grads, params, exp_avg_sqs),
        packed_values=packed and any(reference.is_packed(t, params, exp_avg_sqs) for t in (masters, emas)),
    )
    sizes = _int32([p.element_size() for p in params])
    if tables == "new":
        _run("emulated_adam", *table, sizes, pointers, ctypes.byref(options))
    else:
        _run("emulated_cached_adam", *table, sizes, pointers, ctypes.byref(options), int(tables == "capture"))
