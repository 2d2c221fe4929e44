"""Exact selection of the k-th largest key from histograms: three levels of 11, 10 and 10 bits.

Shared by the reference back end and by selections over process groups, which sum the histograms of all ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import ALL_TIES, INF_KEY, RADIX_BITS


def radix_select(histogram: Callable[[Tensor, int], Tensor], ks: Tensor, ties_all: bool) -> tuple[Tensor, Tensor]:
    """Key of the ks[j]-th largest entry, and how many entries of that very key belong to the ks[j] largest.

    Parameters
    ----------
    histogram: called as (prefixes int32 [m], level), returns counts int64 [m, bins] as ``radix_histogram`` does.
    ks: int64 [m], each at least 1.
    ties_all: keep every entry of the key; the second result is then ``ALL_TIES``.

    Returns
    -------
    keys int32 [m] and tie_limits int64 [m], the arguments of ``threshold_mask``. If fewer than ks[j] entries are
    counted at all, the key is 1 and every entry counts. No host synchronisation.
    """
    remaining = ks.to(torch.int64)
    prefixes = torch.zeros(ks.shape[0], dtype=torch.int32, device=ks.device)
    everything = None
    for level, bits in enumerate(RADIX_BITS):
        counts = histogram(prefixes, level)
        # above[b]: entries in bins greater than b. The wanted bin is the last one with above + count >= remaining.
        at_least = counts.flip(1).cumsum(1).flip(1)
        if level == 0:
            everything = at_least[:, 0] < remaining
        digit = ((at_least >= remaining.unsqueeze(1)).sum(1) - 1).clamp(min=0)
        above = at_least.gather(1, digit.unsqueeze(1)) - counts.gather(1, digit.unsqueeze(1))
        remaining = remaining - above.squeeze(1)
        prefixes = (prefixes << bits) | digit.to(torch.int32)
    all_ties = torch.full_like(remaining, ALL_TIES)
    keys = torch.where(everything, 1, prefixes).clamp(min=1, max=INF_KEY).to(torch.int32)
    return keys, all_ties if ties_all else torch.where(everything, all_ties, remaining)
