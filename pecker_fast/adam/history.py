"""How the steps so far treated the entries, which determines the form of step counts and EMA."""

import torch

from .. import ops
from ..mask import SaliencyMask
from .binding import Binding
from .slots import Slot


class History:
    """The regime of an optimizer's steps, kept up by ``enter`` before each step.

    regime: "fresh": no step yet; "all": every step updated all entries; "mask": every step was masked by one and the
        same mask; "mixed": anything else, from which on step counts are kept per entry.
    binding: the last mask that moments or counts depend on.
    ema_follows: in regime "mask", whether the EMA equals the parameter outside the mask, so that it can be left alone.
    masks: the last two different masks, of joint steps too.
    last_step: "plain", "masked", "joint" or None.
    """

    def __init__(self, slots: list[Slot], previous: "History | None" = None) -> None:
        """Reads the regime off the state, which may have been loaded or edited; ``previous`` is for the statistics."""
        states = [slot.state for slot in slots if "step" in slot.state]
        if any("counts" in state for state in states):
            self.regime = "mixed"
        elif any("mask_words" in state for state in states):
            self.regime = "mask"
        else:
            self.regime = "all" if any(float(state["step"]) > 0 for state in states) else "fresh"
        self.binding: Binding | None = None
        self.ema_follows = False
        self.masks: tuple[SaliencyMask | None, SaliencyMask | None] = previous.masks if previous else (None, None)
        self.last_step: str | None = previous.last_step if previous else None
        self._has_entered = False

    def is_repacked_by(self, binding: Binding) -> bool:
        """Whether packed state is about to move to another mask."""
        return self.binding is not None and self.binding.mask is not binding.mask

    def record(self, kind: str, mask: SaliencyMask | None) -> None:
        """Remembers an executed step."""
        self.last_step = kind
        if mask is not None and mask is not self.masks[1]:
            self.masks = (self.masks[1], mask)

    def enter(self, kind: str, binding: Binding | None, slots: list[Slot], backend: str | None) -> bool:
        """Keeps step counts right where the next step treats entries unlike those before; re-packs for a new mask.

        Returns whether tensors of the state may have been added or replaced.
        """
        masked = kind == "masked"
        before = self.regime
        if self._has_entered and (
            (masked and before in ("mask", "mixed") and binding is self.binding)
            or (not masked and before in ("all", "mixed"))
        ):
            return False
        self._has_entered = True
        started = [slot for slot in slots if "step" in slot.state]
        packed = bool(slots) and slots[0].packed
        if before == "fresh":
            self.regime = "mask" if masked else "all"
            if masked and not packed and all("ema" in slot.state for slot in slots):
                self.ema_follows = all(torch.equal(s.state["ema"], s.param.to(s.state["ema"].dtype)) for s in slots)
        elif before == "all" and masked:
            for slot in started:
                slot.start_counts(None)
            self.regime = "mixed"
        elif before == "mask" and not (masked and self._same_mask(binding, started)):
            for slot in started:
                words, shape = slot.state["mask_words"], slot.param.shape
                slot.start_counts(None if packed else ops.unpack_bits(words, slot.param.numel()).view(shape))
            self.regime = "mixed"
        if packed and not self._same_mask(binding, started):
            _repack(started, binding, backend)
        # The words are needed while one mask tells which entries the shared count is of, or which ones are packed.
        keeps_words = masked and (packed or self.regime == "mask")
        for slot in started:
            if not keeps_words:
                slot.state.pop("mask_words", None)
            elif slot.position in binding.positions:
                slot.state["mask_words"] = binding.tensor_words(slot)
        if masked:
            self.binding = binding
        return True

    def _same_mask(self, binding: Binding, started: list[Slot]) -> bool:
        """Whether the present state belongs to exactly this mask."""
        if self.binding is not None and self.binding.mask is binding.mask:
            return True
        held = [slot for slot in started if "mask_words" in slot.state and slot.position in binding.positions]
        return all(torch.equal(slot.state["mask_words"], binding.tensor_words(slot)) for slot in held)


def _repack(started: list[Slot], binding: Binding, backend: str | None) -> None:
    counts = binding.mask.tensor_counts()
    for slot in started:
        tensor = binding.positions.get(slot.position)
        if tensor is not None:
            slot.repack(slot.state["mask_words"], binding.tensor_words(slot), counts[tensor], backend)
