"""Means of magnitudes, whatever the order of the entries: the same on every back end and any number of ranks."""

import torch
from torch import Tensor

from .layout import SUM_WINDOWS


def magnitude_means(sums: Tensor) -> Tensor:
    """Mean magnitude of the finite entries, 0 if there are none: float64 [n].

    Parameters
    ----------
    sums : Tensor
        Shape (n, SUM_COLUMNS), int64: the result of ``magnitude_sums``, added up over the parts of each tensor.

    Returns
    -------
    Tensor
        Shape (n,), float64. The integers are exact, and the floating-point numbers that follow are elementwise sums in
        the order of a fixed binary tree, so the bits are the same on every device.
    """
    low, high = sums[:, :SUM_WINDOWS], sums[:, SUM_WINDOWS : 2 * SUM_WINDOWS]
    # Sums may be split differently: normalise the low part to 32 bits.
    high, low = high + (low >> 32), low & 0xFFFFFFFF
    # Powers of two by their bits: not every device's exp2 is exact.
    windows = torch.arange(SUM_WINDOWS, dtype=torch.int64, device=sums.device)
    units = ((16 * windows - 150 + 1023) << 52).view(torch.float64)
    terms = low.double() * units + high.double() * (units * 2.0**32)
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    return terms[:, 0] / sums[:, -1].clamp(min=1).double()
