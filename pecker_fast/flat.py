"""Tensors as flat memory. The operators work on contiguous memory, whatever the strides of a tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor


class FlatView:
    """View of tensors with a given shape and strides as contiguous memory.

    A tensor is *dense* if its entries fill a block of memory without gaps or overlaps, in any order of dimensions
    (contiguous, channels_last, transposed). ``flatten`` of a dense tensor is a one-dimensional view in storage order.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.is_contiguous = tensor.is_contiguous()
        # Dimensions from the slowest to the fastest in memory; permuted so, a dense tensor is contiguous.
        self.order = sorted(range(tensor.dim()), key=lambda d: (-self.stride[d], d))
        self.is_dense = tensor.permute(self.order).is_contiguous()

    def flatten(self, tensor: Tensor) -> Tensor:
        """One-dimensional, in this view's storage order: a view if ``tensor`` has that layout, otherwise a copy."""
        if self.is_contiguous and tensor.is_contiguous():
            return tensor.view(-1)
        # An expanded tensor is viewed as one dimension without becoming contiguous.
        return tensor.permute(self.order).reshape(-1).contiguous()


def contiguous_grads(grads: Sequence[Tensor]) -> list[Tensor]:
    """Row-major gradients: the tensors themselves if they are contiguous, otherwise copies."""
    return [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]


def describe(tensor: Tensor) -> str:
    """Describes dtype, layout and shape for error messages."""
    layout = "" if tensor.layout is torch.strided else f" {str(tensor.layout).removeprefix('torch.')}"
    return f"{str(tensor.dtype).removeprefix('torch.')}{layout} tensor of shape {tuple(tensor.shape)}"
