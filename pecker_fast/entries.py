"""The entries of a tensor that a mask has, packed, and put back."""

import torch
from torch import Tensor

from . import ops
from .flat import row_major


def take_entries(tensor: Tensor, words: Tensor, count: int, backend: str | None = None) -> Tensor:
    """Copy the entries of a tensor that a mask has.

    Parameters
    ----------
    tensor : Tensor
        Floating, int32 or int16, of any shape and strides.
    words : Tensor
        int32: the mask, see ``SaliencyMask.tensor_words``.
    count : int
        Number of its entries.
    backend : str, optional
        As in ``saliency_mask``.

    Returns
    -------
    Tensor
        [count], in row-major order.
    """
    return ops.pack(row_major(tensor.detach()), words, count, backend=backend)


def put_entries(tensor: Tensor, words: Tensor, values: Tensor, backend: str | None = None) -> None:
    """Set the entries of ``tensor`` that a mask has, in place, to ``values``; arguments as of ``take_entries``."""
    numel = tensor.numel()
    dense = ops.unpack(values, words, numel, backend=backend).view(tensor.shape)
    tensor.copy_(torch.where(ops.unpack_bits(words, numel).view(tensor.shape), dense, tensor))
