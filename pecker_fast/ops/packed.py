"""masked_adam_ with packed gradients, masters and averages, for a kernel that knows packed moments only: Triton's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import checks, reference
from .layout import num_words
from .reference import is_packed, unpack_bits

Tensors = Sequence[Tensor]


def needs_packed_values(
    params: Tensors, grads: Sequence[Tensor | None], masters: Tensors, emas: Tensors, exp_avg_sqs: Tensors
) -> bool:
    """Whether one of the lists holds the salient entries only."""
    return any(is_packed(tensors, params, exp_avg_sqs) for tensors in (grads, masters, emas))


def step_on_packed_values(
    step: Callable,
    pack: Callable,
    unpack: Callable,
    params: Tensors,
    grads: Sequence[Tensor | None],
    masked_grads: Sequence[Tensor | None],
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    masters: Tensors,
    emas: Tensors,
    counts: Tensors,
    steps: Tensor,
    lr: Tensor,
    bias_table: Tensor | None,
    words: Tensor,
    word_offsets: Sequence[int],
    packed_offsets: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    **options,
) -> None:
    """Packs the salient values of the parameters, runs a plain step on them, and puts them back.

    ``step``, ``pack`` and ``unpack`` are the back end's. Three more passes over parameters and mask than a kernel of
    its own would need.
    """
    state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts)
    tail = (steps, lr, bias_table, words, word_offsets, packed_offsets, grad_scale, found_inf)
    checks.masked_adam_(params, grads, masked_grads, *state, *tail, **options)
    if options.get("stochastic_rounding") and not masters and params[0].dtype in (torch.bfloat16, torch.float16):
        # The random bits of an entry depend on its place in the parameter.
        reference.masked_adam_(params, grads, masked_grads, *state, *tail, **options)
        return
    masks = [words[offset:][: num_words(param.numel())] for param, offset in zip(params, word_offsets, strict=False)]
    counts_of = [v.numel() for v in exp_avg_sqs]
    packed_grads = is_packed(grads, params, exp_avg_sqs)
    if (masters or emas) and not is_packed([*masters, *emas], [*params, *params], [*exp_avg_sqs, *exp_avg_sqs]):
        # Packed gradients alone.
        pairs = zip(grads, masks, params, strict=True)
        grads = [None if g is None else unpack(g, mask, param.numel()) for g, mask, param in pairs]
        step(params, grads, masked_grads, *state, *tail, **options)
        return
    options.pop("ema_everywhere", None)
    values = [pack(param, mask, count) for param, mask, count in zip(params, masks, counts_of, strict=True)]
    packed = [
        grad if grad is None or packed_grads else pack(grad, mask, count)
        for grad, mask, count in zip(grads, masks, counts_of, strict=True)
    ]
    step(values, packed, [], *state, steps, lr, bias_table, None, [], None, grad_scale, found_inf, **options)
    for param, grad, value, mask in zip(params, grads, values, masks, strict=True):
        if grad is not None and param.numel():
            new = unpack(value, mask, param.numel()).view(param.shape)
            param.copy_(torch.where(unpack_bits(mask, param.numel()).view(param.shape), new, param))
