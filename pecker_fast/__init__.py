"""Fast unlearning in diffusion models: exact saliency masks, masked Adam, and whole runs of unlearning.

``unlearn``, ``distil``, ``evaluate``, ``compare`` and ``Run`` are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .mask import SaliencyMask
from .ops import set_backend
from .optim import MaskedAdam, pack_gradients
from .saliency import SaliencyAccumulator, saliency_mask

if TYPE_CHECKING:
    from .runs.api import compare, distil, evaluate, unlearn
    from .runs.compare import Comparison
    from .runs.run import Run

__all__ = [
    "Comparison",
    "MaskedAdam",
    "Run",
    "SaliencyAccumulator",
    "SaliencyMask",
    "compare",
    "distil",
    "evaluate",
    "pack_gradients",
    "saliency_mask",
    "set_backend",
    "unlearn",
]
__version__ = "0.1.0"

# Name to the module that has it.
_LAZY = {
    "Comparison": ".runs.compare",
    "Run": ".runs.run",
    "compare": ".runs.api",
    "distil": ".runs.api",
    "evaluate": ".runs.api",
    "unlearn": ".runs.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
