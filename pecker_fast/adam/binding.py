"""A mask in the form that the kernel takes for an optimizer's parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mask import SaliencyMask
from .slots import Slot


@dataclass(eq=False)
class Binding:
    """A mask's words, and the first word of each parameter (by position)."""

    mask: SaliencyMask
    params: tuple[int, ...]  # id of each aligned parameter, in order
    positions: dict[int, int]  # parameter position -> tensor of the mask
    words: Tensor
    offsets: dict[int, int]

    @classmethod
    def make(cls, mask: SaliencyMask, slots: Sequence[Slot]) -> "Binding":
        names = [slot.name for slot in slots]
        tensors = mask.align([slot.owner for slot in slots], None if None in names else names)
        words, offsets, extra = mask.words, {}, mask.words.numel()
        reordered = []
        for slot, tensor in zip(slots, tensors, strict=True):
            if slot.copied or slot.view.is_contiguous:
                offsets[slot.position] = mask.word_offsets[tensor]
            else:
                # The kernel sees this parameter in storage order, so it needs the mask in that order too.
                reordered.append(mask.words_in_storage_order(tensor, slot.view))
                offsets[slot.position] = extra
                extra += reordered[-1].numel()
        if reordered:
            words = torch.cat([words, *reordered])
        positions = {slot.position: tensor for slot, tensor in zip(slots, tensors, strict=True)}
        return cls(mask, tuple(id(slot.owner) for slot in slots), positions, words, offsets)

    def tensor_words(self, slot: Slot) -> Tensor:
        """The mask's words of this parameter, in row-major order."""
        return self.mask.tensor_words(self.positions[slot.position])

    def count(self, slot: Slot) -> int:
        """Salient entries of this parameter. The first use of a mask waits for the device."""
        return self.mask.tensor_counts()[self.positions[slot.position]]


class Bindings:
    """The bindings of the last two masks: alternating between two masks stays cheap, and older masks are freed."""

    def __init__(self) -> None:
        self._last: list[Binding] = []

    def of(self, mask: SaliencyMask, slots: list[Slot], active: list[Slot], owners: tuple[int, ...]) -> Binding:
        """The binding of ``mask`` to the parameters that train or have a gradient (``active``); ``owners``: the ids of
        all parameters (``slots``)."""
        if not isinstance(mask, SaliencyMask):
            raise TypeError(f"mask is {type(mask).__name__}, expected a SaliencyMask (made by saliency_mask)")
        wanted = slots
        if len(active) < len(slots):
            needed = {slot.position for slot in active}
            wanted = [slot for slot in slots if slot.owner.requires_grad or slot.position in needed]
            owners = tuple(id(slot.owner) for slot in wanted)
        binding = next((b for b in self._last if b.mask is mask), None)
        if binding is None or (binding.params is not owners and binding.params != owners):
            self._last = [b for b in self._last if b.mask is not mask][-1:]
            binding = Binding.make(mask, wanted)
            self._last.append(binding)
        return binding
