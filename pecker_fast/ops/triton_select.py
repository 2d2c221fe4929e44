"""select on the Triton back end: the radix selection all back ends share, over Triton's histograms and masks."""

from collections.abc import Sequence

from torch import Tensor

from .radix_select import radix_select


def select(scores: Sequence[Tensor], ks: Tensor, ties_all: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.select import radix_histogram, threshold_mask

    keys, tie_limits = radix_select(lambda prefixes, level: radix_histogram(scores, prefixes, level), ks, ties_all)
    return threshold_mask(scores, keys, tie_limits)
