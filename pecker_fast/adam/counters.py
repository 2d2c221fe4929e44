"""Step counts: one vector a device, whose elements are ``state[p]["step"]``, so that one addition advances all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .slots import Slot


class StepCounters:
    """The vectors of an optimizer's parameters, by device; a parameter's element is at its position."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._vectors: dict[torch.device, Tensor] = {}
        self._size = len(slots)
        for slot in slots:
            if "step" in slot.state:
                self.adopt(slot)

    def vector(self, device: torch.device) -> Tensor:
        """float32 [number of parameters]."""
        if device not in self._vectors:
            self._vectors[device] = torch.zeros(self._size, dtype=torch.float32, device=device)
        return self._vectors[device]

    def adopt(self, slot: Slot) -> None:
        """Makes ``state["step"]`` an element of the vector, with its present value or 0."""
        counter = self.vector(slot.param.device)[slot.position]
        value = slot.state.get("step")
        if isinstance(value, Tensor):
            if value.data_ptr() != counter.data_ptr() or value.dtype != counter.dtype:
                # The same tensor with other memory: other references to it keep seeing the count.
                value.data = counter.copy_(value.reshape(()))
            return
        counter.fill_(0.0 if value is None else float(value))
        slot.state["step"] = counter
