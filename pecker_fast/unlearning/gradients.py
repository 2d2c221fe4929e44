"""Gradients beside ``.grad``: summed in place, a second gradient of the weights costs one copy of them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..sharding import is_sharded


def add_gradients(
    output: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor] | None, grad_output: Tensor | None = None
) -> list[Tensor]:
    """Add the gradients of an output to gradients that are kept beside ``.grad``.

    Parameters
    ----------
    output : Tensor
        Its graph is freed.
    params : sequence of Tensor
        Leaves that require gradients; their ``.grad`` is left as it is. If they are sharded, ``output`` depends on no
        other leaves.
    grads : sequence of Tensor, optional
        Result of an earlier call, added to in place; None starts at zero.
    grad_output : Tensor, optional
        Gradient of ``output`` if that is not a scalar.

    Returns
    -------
    list of Tensor
        A gradient for each parameter, zeros if ``output`` does not depend on it. Of sharded parameters, the mean over
        the processes, sharded likewise.
    """
    # With FSDP the graph's leaves are the whole parameters that it gathers, and it collects their gradients itself.
    inputs = None if is_sharded(params[0]) else list(params)
    own_grads = [param.grad for param in params]
    try:
        for i, param in enumerate(params):
            param.grad = None if grads is None else grads[i]
        output.backward(grad_output, inputs=inputs)
        return [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    finally:
        for param, grad in zip(params, own_grads, strict=True):
            param.grad = grad


@contextmanager
def dropped_gradients(params: Iterable[Tensor]) -> Iterator[None]:
    """Within it, each parameter's gradient is dropped as soon as a backward pass has computed it."""

    def drop(param: Tensor) -> None:
        param.grad = None

    handles = [param.register_post_accumulate_grad_hook(drop) for param in params]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
