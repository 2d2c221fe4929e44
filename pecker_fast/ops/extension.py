"""The compiled kernels: loads them, and knows why they are missing."""

import importlib
import json
from functools import cache
from pathlib import Path

_BUILD_RECORD = Path(__file__).resolve().parents[1] / "_build.json"
_MODULES = {"cpu": "pecker_fast._C", "cuda": "pecker_fast._C_cuda"}


def build_record() -> dict[str, str | None]:
    """What setup.py wrote: for "cpu" and "cuda" None, or why those kernels were not built."""
    try:
        return json.loads(_BUILD_RECORD.read_text())
    except FileNotFoundError:
        return {}


@cache
def why_missing(backend: str) -> str | None:
    """Loads the compiled kernels of ``backend`` ("cpu" or "cuda"): None, or the reason why that cannot be done."""
    module = _MODULES[backend]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            return f"{module} cannot be loaded: {error}"
        reason = build_record().get(backend)
        return reason or "not built: install the package with a C++ compiler (pip install --no-build-isolation -e .)"
    except ImportError as error:
        return f"{module} cannot be loaded, most likely built for another torch: {error}"
    return None
