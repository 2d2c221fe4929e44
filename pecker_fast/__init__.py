"""Fast unlearning in diffusion models: exact saliency masks, masked Adam, and whole runs of unlearning.

``unlearn``, ``distil``, ``evaluate``, ``compare``, ``Run`` and the functions of patch files are imported when they are
first used. So is everything else if the process is the command line, which answers before torch is loaded.
"""

import importlib
import os
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

_IS_COMMAND_LINE = os.path.basename(sys.argv[0]) == "pecker-fast" or ("-m", "pecker_fast") in pairwise(sys.orig_argv)

if TYPE_CHECKING or not _IS_COMMAND_LINE:
    # Also registers the operators, torch.ops.pecker_fast.*.
    from .mask import SaliencyMask
    from .ops import set_backend
    from .optim import MaskedAdam, pack_gradients
    from .saliency import SaliencyAccumulator, saliency_mask

if TYPE_CHECKING:
    from .patches import Patch, patch_mask
    from .runs.api import compare, distil, evaluate, unlearn
    from .runs.compare import Comparison
    from .runs.patches import apply_patch, inspect_patch, make_patch, revert_patch, verify_patch
    from .runs.run import Run

__all__ = [
    "Comparison",
    "MaskedAdam",
    "Patch",
    "Run",
    "SaliencyAccumulator",
    "SaliencyMask",
    "apply_patch",
    "compare",
    "distil",
    "evaluate",
    "inspect_patch",
    "make_patch",
    "pack_gradients",
    "patch_mask",
    "revert_patch",
    "saliency_mask",
    "set_backend",
    "unlearn",
    "verify_patch",
]
__version__ = "0.1.0"

# Name to the module that has it.
_LAZY = {
    "Comparison": ".runs.compare",
    "MaskedAdam": ".optim",
    "Patch": ".patches",
    "Run": ".runs.run",
    "SaliencyAccumulator": ".saliency",
    "SaliencyMask": ".mask",
    "apply_patch": ".runs.patches",
    "compare": ".runs.api",
    "distil": ".runs.api",
    "evaluate": ".runs.api",
    "inspect_patch": ".runs.patches",
    "make_patch": ".runs.patches",
    "pack_gradients": ".optim",
    "patch_mask": ".patches",
    "revert_patch": ".runs.patches",
    "saliency_mask": ".saliency",
    "set_backend": ".ops",
    "unlearn": ".runs.api",
    "verify_patch": ".runs.patches",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
