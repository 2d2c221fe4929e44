"""Exact saliency masks and masked Adam, for unlearning in diffusion models."""

from .mask import SaliencyMask
from .ops import set_backend
from .optim import MaskedAdam
from .saliency import SaliencyAccumulator, saliency_mask

__all__ = ["MaskedAdam", "SaliencyAccumulator", "SaliencyMask", "saliency_mask", "set_backend"]
__version__ = "0.1.0"
