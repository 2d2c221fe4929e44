"""Argument checks of the back ends written in Python; the compiled ones make the same checks in C++.

One function an operator, with the operator's signature. Each raises before anything is written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import INF_KEY, RADIX_BITS, num_blocks, num_words
from .reference import compute_dtype, is_packed

SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAM_DTYPES = (*SCORE_DTYPES, torch.float64)
REDUCTIONS = ("sum", "abs_sum", "sq_sum")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    if tensor.layout is not torch.strided or tensor.dtype not in dtypes:
        raise TypeError(
            f"{name} is a {tensor.layout} tensor of {tensor.dtype}, expected a dense tensor of {_names(dtypes)}"
        )
    require(tensor.device == device, f"{name} is on {tensor.device}, expected {device}")
    require(tensor.is_contiguous(), f"{name} with strides {tensor.stride()} is not contiguous")


def _scores(scores: Sequence[Tensor], device: torch.device) -> None:
    for i, score in enumerate(scores):
        _tensor(f"scores[{i}]", score, SCORE_DTYPES, device)


def _relative(scores: Sequence[Tensor], relative_to, damping: Tensor | None, device: torch.device) -> None:
    require((relative_to is None) == (damping is None), "give both of relative_to and damping, or neither")
    if relative_to is None or damping is None:
        return
    require(len(relative_to) == len(scores), f"{len(relative_to)} relative_to for {len(scores)} scores")
    for i, (score, other) in enumerate(zip(scores, relative_to, strict=True)):
        _tensor(f"relative_to[{i}]", other, (score.dtype,), device)
        _same_size(f"relative_to[{i}]", other, f"scores[{i}]", score.numel())
    _tensor("damping", damping, (torch.float32,), device)
    require(damping.shape == (len(scores),), f"damping has shape {tuple(damping.shape)}, expected ({len(scores)},)")


def _rows(name: str, rows: Tensor, dtype: torch.dtype) -> None:
    _tensor(name, rows, (dtype,), rows.device)
    require(rows.dim() == 1, f"{name} has shape {tuple(rows.shape)}, expected one dimension")


def _words(words: Tensor, word_offsets: Sequence[int], numels: Sequence[int], device: torch.device) -> None:
    _tensor("words", words, (torch.int32,), device)
    require(len(word_offsets) >= len(numels), f"word_offsets has {len(word_offsets)} entries for {len(numels)} tensors")
    for i, (offset, numel) in enumerate(zip(word_offsets, numels, strict=False)):
        end = offset + num_words(numel)
        require(
            offset >= 0 and end <= words.numel(),
            f"word_offsets[{i}] = {offset}: words {offset} to {end} of tensor {i} are not among the {words.numel()}",
        )


def radix_histogram(scores, prefixes, level, relative_to=None, damping=None):
    _rows("prefixes", prefixes, torch.int32)
    require(0 <= level < len(RADIX_BITS), f"level is {level}, expected 0 to {len(RADIX_BITS) - 1}")
    _scores(scores, prefixes.device)
    _relative(scores, relative_to, damping, prefixes.device)


def threshold_mask(scores, keys, tie_limits, relative_to=None, damping=None):
    _rows("keys", keys, torch.int32)
    _rows("tie_limits", tie_limits, torch.int64)
    require(keys.shape == tie_limits.shape, f"keys has {len(keys)} rows and tie_limits {len(tie_limits)}")
    require(tie_limits.device == keys.device, f"tie_limits is on {tie_limits.device}, keys on {keys.device}")
    if keys.device.type == "cpu":
        require(bool(((keys >= 1) & (keys <= INF_KEY)).all()), f"keys must be from 1 to {INF_KEY}, got {keys.tolist()}")
    _scores(scores, keys.device)
    _relative(scores, relative_to, damping, keys.device)


def select(scores, ks, ties_all=False, relative_to=None, damping=None):
    _rows("ks", ks, torch.int64)
    if ks.device.type == "cpu":
        require(bool((ks >= 1).all()), f"ks must be at least 1, got {ks.tolist()}")
    _scores(scores, ks.device)
    _relative(scores, relative_to, damping, ks.device)


def magnitude_sums(tensors):
    for i, tensor in enumerate(tensors):
        _tensor(f"tensors[{i}]", tensor, SCORE_DTYPES, tensors[0].device)


def block_counts(words, word_offsets, numels):
    _words(words, word_offsets, numels, words.device)


def pack(dense, words, count):
    _tensor("dense", dense, (*PARAM_DTYPES, torch.int32, torch.int16), dense.device)
    _words(words, [0], [dense.numel()], dense.device)
    require(0 <= count <= dense.numel(), f"count is {count}, expected 0 to {dense.numel()}")


def unpack(packed, words, numel):
    _tensor("packed", packed, (*PARAM_DTYPES, torch.int32, torch.int16), packed.device)
    require(numel >= 0, f"numel is {numel}, expected at least 0")
    _words(words, [0], [numel], packed.device)
    require(packed.numel() <= numel, f"packed has {packed.numel()} entries, more than numel = {numel}")


def apply_mask_(tensors, words, word_offsets):
    for i, tensor in enumerate(tensors):
        _tensor(f"tensors[{i}]", tensor, PARAM_DTYPES, words.device)
    _words(words, word_offsets, [t.numel() for t in tensors], words.device)


def accumulate_(accumulators, grads, reduce):
    require(reduce in REDUCTIONS, f"reduce is {reduce!r}, expected one of {', '.join(REDUCTIONS)}")
    require(len(accumulators) == len(grads), f"{len(accumulators)} accumulators for {len(grads)} grads")
    for i, (accumulator, grad) in enumerate(zip(accumulators, grads, strict=True)):
        device = accumulators[0].device
        _tensor(f"accumulators[{i}]", accumulator, (torch.float32,), device)
        _tensor(f"grads[{i}]", grad, PARAM_DTYPES, device)
        _same_size(f"accumulators[{i}]", accumulator, f"grads[{i}]", grad.numel())


def _same_size(name: str, tensor: Tensor, other: str, numel: int) -> None:
    require(tensor.numel() == numel, f"{name} has {tensor.numel()} entries, {other} has {numel}")


def _scalar(name: str, tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
    if tensor is not None:
        _tensor(name, tensor, (dtype,), device)
        require(tensor.numel() == 1, f"{name} has shape {tuple(tensor.shape)}, expected a scalar")


def _gradients(grads, masked_grads, numels: Sequence[int] | None, dtype, device) -> None:
    require(
        len(masked_grads) in (0, len(grads)),
        f"{len(masked_grads)} masked_grads for {len(grads)} grads, expected as many or none",
    )
    for name, tensors in (("grads", grads), ("masked_grads", masked_grads)):
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                _tensor(f"{name}[{i}]", tensor, (dtype,), device)
                if numels is not None:
                    _same_size(f"{name}[{i}]", tensor, f"params[{i}]", numels[i])


def count_nonfinite(grads, masked_grads, words, word_offsets, grad_scale=None):
    present = [g for g in [*grads, *masked_grads] if g is not None]
    if not present:
        return
    dtype, device = present[0].dtype, present[0].device
    if dtype not in PARAM_DTYPES:
        raise TypeError(f"grads are {dtype}, expected {_names(PARAM_DTYPES)}")
    _gradients(grads, masked_grads, None, dtype, device)
    pairs = list(zip(grads, masked_grads, strict=True)) if masked_grads else [(g, None) for g in grads]
    for i, (grad, masked_grad) in enumerate(pairs):
        if grad is not None and masked_grad is not None:
            _same_size(f"masked_grads[{i}]", masked_grad, f"grads[{i}]", grad.numel())
    if words is not None:
        numels = [next((g.numel() for g in pair if g is not None), 0) for pair in pairs]
        _words(words, word_offsets, numels, device)
    _scalar("grad_scale", grad_scale, torch.float32, device)


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
    beta1,
    beta2,
    eps,
    ema_decay=None,
    tensor_numbers=(),
    **options,
):
    if not params:
        return
    n, dtype, device = len(params), params[0].dtype, params[0].device
    if dtype not in PARAM_DTYPES:
        raise TypeError(f"params are {dtype}, expected {_names(PARAM_DTYPES)}")
    numels = [param.numel() for param in params]
    for i, param in enumerate(params):
        _tensor(f"params[{i}]", param, (dtype,), device)
    require(len(grads) == n, f"{len(grads)} grads for {n} params")
    require(len(exp_avg_sqs) == n, f"{len(exp_avg_sqs)} exp_avg_sqs for {n} params")
    require(
        len(tensor_numbers) in (0, n), f"{len(tensor_numbers)} tensor_numbers for {n} params, expected as many or none"
    )
    packed = packed_offsets is not None
    packed_grads, *both = (packed and is_packed(tensors, params, exp_avg_sqs) for tensors in (grads, masters, emas))
    _gradients(grads, masked_grads, None if packed_grads else numels, dtype, device)
    compute = compute_dtype(dtype)
    require(not packed or (words is not None and not masked_grads), "packed_offsets are only for masked steps")
    require(bool(exp_avgs) == (beta1 != 0), f"exp_avgs must be given exactly when beta1 is not 0, beta1 is {beta1}")
    require(ema_decay is None or bool(emas), "ema_decay is given without emas")
    require(not emas or ema_decay is not None, "emas are given without ema_decay")
    if masters and compute == dtype:
        raise TypeError(f"masters are for bfloat16 and float16 parameters, params are {dtype}")
    state = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs, "counts": counts}
    dense = {"masters": masters, "emas": emas}
    if any(both):
        require(not (masters and emas) or all(both), "either both masters and emas are packed or none")
        require(not options.get("ema_everywhere"), "ema_everywhere is for emas of all entries, these are packed")
        state, dense = {**state, **dense}, {}
    for name, tensors in {**state, **dense}.items():
        require(len(tensors) in (0, n), f"{len(tensors)} {name} for {n} params, expected as many or none")
        dtypes = (torch.int16, torch.int32) if name == "counts" else (compute,)
        for i, tensor in enumerate(tensors):
            _tensor(f"{name}[{i}]", tensor, dtypes, device)
            if name in dense or not packed:
                _same_size(f"{name}[{i}]", tensor, f"params[{i}]", numels[i])
            else:
                _same_size(f"{name}[{i}]", tensor, f"exp_avg_sqs[{i}]", exp_avg_sqs[i].numel())
    _tensor("steps", steps, (torch.float32,), device)
    require(steps.numel() == n, f"steps has {steps.numel()} entries for {n} params")
    _scalar("lr", lr, torch.float64, device)
    _scalar("grad_scale", grad_scale, torch.float32, device)
    _scalar("found_inf", found_inf, torch.float32, device)
    if counts:
        require(bias_table is not None, "counts are given without bias_table")
        _tensor("bias_table", bias_table, (compute,), device)
        require(
            bias_table.dim() == 2 and bias_table.shape[0] >= 2 and bias_table.shape[1] == 2,
            f"bias_table has shape {tuple(bias_table.shape)}, expected [rows, 2] with at least 2 rows",
        )
    if words is not None:
        _words(words, word_offsets, numels, device)
    if packed:
        _tensor("packed_offsets", packed_offsets, (torch.int64,), device)
        blocks = sum(num_blocks(numel) for numel in numels)
        require(
            packed_offsets.numel() == blocks, f"packed_offsets has {packed_offsets.numel()} entries, expected {blocks}"
        )
