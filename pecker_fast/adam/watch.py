"""The parameters of an optimizer and their gradients at each step. Detects parameters with other memory.

csrc/adam_plan.cpp does the work for each parameter. ``PythonWatch`` does the same in Python: without the compiled
library, for back ends written in Python, and for sharded parameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.dispatch import op_overload, resolve
from ..ops.extension import why_missing
from ..sharding import local
from .alignment import fits

# What collect() returns; the numbers are those of csrc/adam_plan.cpp.
AS_EXPECTED, EDITED, OTHER_GRADIENTS = range(3)


def _memory(tensor: Tensor) -> tuple:
    """Address and layout of a tensor's entries."""
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride(),
        tensor.is_neg(),
    )


class PythonWatch:
    """The interface of csrc/adam_plan.cpp's ParameterWatch, which documents each method."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._memory = [_memory(local(param)) for param in params]
        self._present = [True] * len(params)
        self._packed: list[Tensor] = []
        self._entries: list[Tensor] = []
        self.grads: list[Tensor | None] = []
        self.masked_grads: list[Tensor | None] = []
        self.record()

    def expect(self, present: list[bool]) -> None:
        self._present = present

    def pack(self, packed: list[Tensor], entries: list[Tensor]) -> None:
        self._packed, self._entries = packed, entries

    def is_current(self) -> bool:
        # FSDP may replace the local parts of parameters, in the first forward pass after loading a state for instance.
        return [_memory(local(param)) for param in self._params] == self._memory

    def collect(self, masked_grads: Sequence[Tensor | None]) -> int:
        self.release()
        if not self.is_current():
            return EDITED
        params = self._params
        parts = [local(param) for param in params]
        grads = [None if param.grad is None else local(param.grad) for param in params]
        pairs = list(zip(grads, masked_grads, strict=True)) if masked_grads else [(grad, None) for grad in grads]
        if [grad is not None or other is not None for grad, other in pairs] != self._present:
            return OTHER_GRADIENTS
        if self._packed:
            if any(grad is not None and grad is not packed for grad, packed in zip(grads, self._packed, strict=True)):
                return OTHER_GRADIENTS
            grads = [None if grad is None else entries for grad, entries in zip(grads, self._entries, strict=True)]
        elif not all(g is None or fits(g, part) for part, pair in zip(parts, pairs, strict=True) for g in pair):
            return OTHER_GRADIENTS
        self.grads, self.masked_grads = grads, masked_grads
        return AS_EXPECTED

    def release(self) -> None:
        self.grads, self.masked_grads = [], []

    def written(self) -> list[int]:
        return [i for i, known in enumerate(self._versions) if local(self._params[i])._version != known]

    def record(self) -> None:
        self._versions = [local(param)._version for param in self._params]

    def bump(self, positions: Sequence[int]) -> None:
        """Tells autograd that a step has written to these parameters."""
        owners = [self._params[i] for i in positions]
        parts = [local(owner) for owner in owners]
        torch.autograd.graph.increment_version([*parts, *(o for o, p in zip(owners, parts, strict=True) if o is not p)])
        for i, part in zip(positions, parts, strict=True):
            self._versions[i] = part._version


def runs_natively(device: torch.device, backend: str | None) -> bool:
    """Whether steps on ``device`` run in compiled kernels. RuntimeError if ``backend`` cannot run there."""
    return resolve("masked_adam_", device, backend) is op_overload("masked_adam_")


def compiled(name: str):
    """A class of csrc/adam_plan.cpp."""
    return getattr(torch.classes.pecker_fast, name)


def can_watch_natively(params: Sequence[Tensor]) -> bool:
    """Whether csrc/adam_plan.cpp is available and these are tensors with their own memory."""
    return why_missing("cpu") is None and all(type(param) in (Tensor, torch.nn.Parameter) for param in params)
