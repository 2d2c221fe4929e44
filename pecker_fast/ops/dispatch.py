"""Which back end runs an operator.

The first of cuda, triton, cpu and reference that ``why_not`` has no reason against. A back end named by the argument,
``set_backend`` or the environment variable ``PECKER_FAST_BACKEND`` (in this order) runs or raises with that reason:
nothing is replaced silently. The automatic choice is logged once a device.
"""

import logging
import os
from collections.abc import Callable
from functools import cache, partial

import torch

from . import checks, reference
from .extension import why_missing
from .schemas import SCHEMAS, op_overload, register_python_kernel

BACKENDS = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT_VARIABLE = "PECKER_FAST_BACKEND"

_logger = logging.getLogger("pecker_fast")
_chosen: str | None = None


def set_backend(name: str | None) -> None:
    """Use one back end for every operator from now on.

    Parameters
    ----------
    name : {"cuda", "triton", "cpu", "reference"} or None
        None returns to the automatic choice by device.

    Raises
    ------
    ValueError
        If there is no back end of that name. One that cannot run raises when an operator is called.
    """
    global _chosen
    _chosen = None if name is None else _checked(name, "backend")


def _checked(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{argument} is {name!r}, expected one of {', '.join(BACKENDS)}, or None for the best available"
        )
    return name


def requested_backend(backend: str | None = None) -> str | None:
    """The back end named by argument, ``set_backend`` or environment; None: choose by device."""
    if backend is not None:
        return _checked(backend, "backend")
    if _chosen is not None:
        return _chosen
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _checked(name, f"environment variable {ENVIRONMENT_VARIABLE}") if name else None


def why_not(backend: str, op: str, device: torch.device) -> str | None:
    """None if ``backend`` can run ``op`` on tensors on ``device``, else the reason why it cannot.

    Every back end takes the same dtypes; the argument checks name a tensor that has another.
    """
    if backend == "reference":
        return None
    if backend == "triton":
        from ..kernels import support

        return support.why_not(op, device)
    if device.type != backend:
        return f"runs on {backend} tensors, these are on {device.type}"
    if backend == "cuda" and not torch.cuda.is_available():
        return why_missing(backend) or "torch finds no CUDA device"
    return why_missing(backend)


@cache
def automatic_backend(op: str, device_type: str) -> str:
    """The first back end in order that can run ``op`` on this type of device."""
    device = torch.device(device_type)
    # Triton's interpreter is for tests: on CPU tensors it runs only if it is named.
    order = [b for b in BACKENDS if not (b == "triton" and device_type == "cpu")]
    reasons = {}
    for backend in order:
        reasons[backend] = why_not(backend, op, device)
        if reasons[backend] is None:
            break
    rejected = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason)
    _logger.info("%s on %s: %s%s", op, device_type, backend, f" ({rejected})" if rejected else "")
    return backend


def resolve(op: str, device: torch.device, backend: str | None = None) -> Callable:
    """The function that runs ``op``, with the signature of its schema.

    Raises RuntimeError if a back end was named that cannot run.
    """
    if torch.compiler.is_compiling():
        # One opaque node in the graph; the dispatcher calls the automatic choice for the device.
        return op_overload(op)
    name = chosen_backend(op, device, backend)
    if name == device.type:
        return op_overload(op)
    return _python_kernel(op, name)


def chosen_backend(op: str, device: torch.device, backend: str | None = None) -> str:
    """The back end that runs ``op``. Raises RuntimeError if one was selected by name and cannot run."""
    name = requested_backend(backend)
    if name is None:
        return automatic_backend(op, device.type)
    reason = why_not(name, op, device)
    if reason is not None:
        raise RuntimeError(f"back end {name!r} cannot run {op}: {reason}")
    return name


@cache
def _python_kernel(op: str, backend: str) -> Callable:
    if backend == "reference":
        kernel = getattr(reference, op)
    else:
        from ..kernels import support

        kernel = support.operator(op)
    check = getattr(checks, op)

    def checked(*args, **kwargs):
        check(*args, **kwargs)
        return kernel(*args, **kwargs)

    return checked


def backend_reasons(device: torch.device | str) -> dict[str, str | None]:
    """For each back end None if it can run on ``device``, otherwise the reason why it cannot."""
    device = torch.device(device)
    return {backend: why_not(backend, "select", device) for backend in BACKENDS}


def _run_automatic(op: str, device_type: str, *args, **kwargs):
    return _python_kernel(op, automatic_backend(op, device_type))(*args, **kwargs)


def _register_dispatcher_kernels() -> None:
    """Let ``torch.ops.pecker_fast.*`` run without the compiled kernels, by the automatic choice."""
    for device_type in ("cpu", "cuda"):
        if why_missing(device_type) is not None:
            for op in SCHEMAS:
                register_python_kernel(op, device_type, partial(_run_automatic, op, device_type))


_register_dispatcher_kernels()
