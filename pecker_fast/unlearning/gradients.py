"""Gradients beside ``.grad``: added up in place, a second gradient of weights costs one copy of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sharding import is_sharded


def add_gradients(
    output: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor] | None, grad_output: Tensor | None = None
) -> list[Tensor]:
    """The gradients of ``output`` in ``params``, added to ``grads`` in place; zeros where it does not depend on them.

    ``params``: leaves that require grad; their ``.grad`` stays what it is. ``grads``: what an earlier call returned, or
    None. ``grad_output``: gradient of ``output`` where that is no scalar. The graph is freed. Where ``params`` are
    sharded, ``output`` depends on no other leaves; the gradients are their mean over the processes, sharded likewise.
    """
    # The graph's leaves are then FSDP's whole parameters, which it makes for the moment and takes the gradients of.
    inputs = None if is_sharded(params[0]) else list(params)
    kept = [param.grad for param in params]
    try:
        for i, param in enumerate(params):
            param.grad = None if grads is None else grads[i]
        output.backward(grad_output, inputs=inputs)
        return [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    finally:
        for param, grad in zip(params, kept, strict=True):
            param.grad = grad
