"""The structures that MaskedAdam derives from its parameters and state, and one step with them."""

from typing import Any

import torch
from torch import Tensor

from ..mask import SaliencyMask
from ..sharding import add_over
from . import averages
from .alignment import MaskedGrads
from .binding import Binding, Bindings
from .buckets import Bucket
from .counters import StepCounters
from .history import History
from .nonfinite import count_nonfinite
from .options import check_group, fill_options
from .roster import Roster
from .slots import Slot


class Runtime:
    """Made at the first step, and again after each edit of the optimizer.

    Methods take the optimizer as an argument: a reference to it would be a cycle, which delays freeing its memory.
    """

    def __init__(self, optimizer: Any, previous: "Runtime | None" = None) -> None:
        groups, defaults = optimizer.param_groups, optimizer.defaults
        for group in groups:
            fill_options(group, defaults)
            check_group(group, defaults)
        roster = previous.roster if previous else None
        self.roster = Roster(groups, optimizer.state, defaults, roster, optimizer._active_packing)
        self.history = History(self.roster.slots, previous.history if previous else None)
        self.nonfinite: Tensor | None = previous.nonfinite if previous else None
        self._structure = self.roster.structure()
        self._counters: StepCounters | None = None
        self._bindings = Bindings()
        self._buckets: list[Bucket] = []
        # Earlier values of a parameter are unknown, so its master is compared with it once.
        self._unknown = {slot.position for slot in self.roster.slots}
        # The parameters of the buckets; None if the buckets are out of date.
        self._bucket_slots: list[Slot] | None = None

    @property
    def slots(self) -> list[Slot]:
        return self.roster.slots

    def is_current(self, optimizer: Any) -> bool:
        """Whether groups, state and kernels are unchanged since this was made; ``collect`` compares the parameters."""
        return self.roster.is_current(optimizer.param_groups, optimizer.state, optimizer._active_packing)

    def start_averages(self, group: dict) -> None:
        """Makes the state that the parameters of a new group have before their first step."""
        for slot in self.slots:
            if slot.group is not group or slot.packed:
                # Packed state begins with the first step, which brings the mask.
                continue
            slot.start_ema()
            if slot.owner.requires_grad:
                # Distributed checkpoints load into the present state, and take a non-empty state for a complete one.
                slot.init_state(None)
                slot.state["step"] = torch.zeros((), device=slot.param.device)
            self.roster.register(slot)
        self.roster.remember_state()

    def collect(self, masked_grads: MaskedGrads | None) -> bool:
        """Takes the gradients of a step; False if the parameters or their memory have changed."""
        return self.roster.collect(masked_grads)

    def step(self, optimizer: Any, kind: str, mask: SaliencyMask | None) -> None:
        """Takes a step with the collected gradients: "plain", "masked" or "joint"."""
        roster, history, backend = self.roster, self.history, optimizer.defaults["backend"]
        slots, active = roster.slots, roster.active
        self._check_options(optimizer)
        if active is not self._bucket_slots or not all([bucket.is_current() for bucket in self._buckets]):
            self._bucket_slots = None
            for slot in active:
                slot.require_complete()
        binding = None if mask is None else self._bindings.of(mask, slots, active, roster.owners)
        if not active:
            return
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        found_inf = self._apply_policy(optimizer.defaults["nonfinite"], binding, scale, found_inf, backend)
        if found_inf is not None and self._can_read(found_inf, binding) and bool(found_inf != 0):
            return
        self.notice_writes()
        if history.enter(kind, binding, slots, backend):
            self._bucket_slots = None
        if self._bucket_slots is None:
            self._make_buckets(binding if kind == "masked" else None)
        packed = optimizer.defaults["packed"]
        ema_everywhere = kind == "masked" and not packed and not (history.regime == "mask" and history.ema_follows)
        for bucket in self._buckets:
            bucket.run(binding, kind == "joint", ema_everywhere, scale, found_inf)
        if optimizer.defaults["ema_decay"] is not None and len(active) < len(slots):
            positions = {slot.position for slot in active}
            averages.follow([slot for slot in slots if slot.position not in positions], found_inf)
        history.record(kind, mask)

    def _check_options(self, optimizer: Any) -> None:
        """Checks the groups' options if they have changed."""
        if self.roster.options_are_current():
            return
        for group in optimizer.param_groups:
            check_group(group, optimizer.defaults)
        self.roster.read_options()
        if self.roster.structure() != self._structure:
            self._structure = self.roster.structure()
            self._bucket_slots = None

    def notice_writes(self) -> None:
        """Updates masters and history of parameters that other code has written to since the last step."""
        if self.roster.has_copies:
            for slot in self.roster.written():
                self.history.ema_follows = False
                slot.refresh_master()

    def _can_read(self, found_inf: Tensor, binding: Binding | None) -> bool:
        """Whether ``found_inf`` can be read now: on the CPU, and when packed state is about to move to another mask,
        which waits for the device anyway."""
        return not found_inf.is_cuda or (self.slots[0].packed and self.history.is_repacked_by(binding))

    def _apply_policy(
        self,
        policy: str,
        binding: Binding | None,
        scale: Tensor | None,
        found_inf: Tensor | None,
        backend: str | None,
    ) -> Tensor | None:
        """Combines GradScaler's found_inf with the optimizer's own policy; counts non-finite entries."""
        if policy == "propagate":
            return found_inf
        roster = self.roster
        # Of packed gradients all entries are in the mask.
        within = binding if roster.packing is None else None
        total = count_nonfinite(roster.active, roster.grads(), roster.masked_grads, within, scale, backend)
        if roster.sharded:
            # All processes make the same decision.
            total = add_over(total, [slot.owner for slot in roster.active])
        if policy == "raise":
            count = int(total)
            if count and not (found_inf is not None and bool(found_inf)):
                raise FloatingPointError(
                    f"{count} gradient entries are inf or NaN (nonfinite='raise'); nothing was changed"
                )
        if self.nonfinite is None:
            self.nonfinite = torch.zeros_like(total)
        # In place: a replayed CUDA graph counts too.
        self.nonfinite.add_(total)
        if policy == "skip":
            own = (total > 0).to(torch.float32)
            found_inf = own if found_inf is None else torch.maximum(own, found_inf.to(own))
        return found_inf

    def _make_buckets(self, binding: Binding | None) -> None:
        """Makes the lists for the kernel, and the state of parameters that have none yet."""
        roster, regime = self.roster, self.history.regime
        if self._counters is None:
            self._counters = StepCounters(roster.slots)
        by_kind: dict[tuple, list[Slot]] = {}
        for slot in roster.active:
            count = binding.count(slot) if binding is not None and slot.packed else None
            started = "step" in slot.state
            if not started and binding is not None and (slot.packed or regime == "mask"):
                slot.state["mask_words"] = binding.tensor_words(slot)
            slot.conform(count)
            if slot.position in self._unknown:
                self._unknown.discard(slot.position)
                slot.refresh_master()
            self._counters.adopt(slot)
            if not started:
                slot.init_state(count)
                if regime == "mixed":
                    slot.start_counts(None)
            if slot.group["ema_decay"] is not None and "ema" not in slot.state:
                slot.start_ema()
            roster.register(slot)
            by_kind.setdefault((id(slot.group), slot.param.device, slot.param.dtype), []).append(slot)
        roster.remember_state()
        self._buckets = [
            Bucket(slots, self._counters.vector(slots[0].param.device), roster) for slots in by_kind.values()
        ]
        self._bucket_slots = roster.active
