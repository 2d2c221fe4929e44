"""The parameters of an optimizer as its steps see them. Detects edits of the optimizer between steps."""

from collections.abc import Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..flat import FlatView, has_lazy_values
from ..sharding import is_sharded, local
from .alignment import MaskedGrads, align_masked_grads, with_gradients
from .options import OPTIONS
from .packing import PackedGradients
from .slots import Slot
from .watch import AS_EXPECTED, OTHER_GRADIENTS, PythonWatch, can_watch_natively, compiled, runs_natively

Groups = list[dict[str, Any]]


class Roster:
    """The slots of all parameters, made from ``param_groups`` and ``state``.

    Users may edit both between steps. The roster remembers the objects it was made from and compares them at each step
    by identity, which takes nanoseconds a parameter.
    """

    def __init__(
        self,
        groups: Groups,
        state: Mapping[Tensor, dict],
        defaults: dict[str, Any],
        previous: "Roster | None" = None,
        packing: PackedGradients | None = None,
    ) -> None:
        self._groups = list(groups)
        self._state = state
        self._backend = defaults["backend"]
        # Set if the steps take packed gradients.
        self.packing = packing
        self._packed: dict[Tensor, Any] | None = None
        self.slots: list[Slot] = []
        for group, names in zip(groups, _names(groups, previous), strict=True):
            for param, name in zip(group["params"], names, strict=True):
                part = local(param)
                view = FlatView(part)
                row_major_only = group["packed"] or not view.is_dense
                copied = has_lazy_values(part) or (row_major_only and not view.is_contiguous)
                # Keep an empty dictionary out of the state: other code takes any non-empty state for a complete one.
                values = state.get(param)
                values = {} if values is None else values
                self.slots.append(Slot(part, param, name, group, values, len(self.slots), view, copied))
        if len({id(slot.owner) for slot in self.slots}) < len(self.slots):
            raise ValueError("a parameter is in param_groups more than once")
        self.names = None if any(slot.name is None for slot in self.slots) else [slot.name for slot in self.slots]
        self.sharded = any(is_sharded(slot.owner) for slot in self.slots)
        self.masked_grads: list[Tensor | None] | None = None
        # Masters and averages go out of date when something else writes to the parameters.
        self.has_copies = any(g["ema_decay"] is not None or g["master_weights"] for g in groups)
        self.devices = list(dict.fromkeys(slot.param.device for slot in self.slots))
        self.may_be_captured = any(device.type != "cpu" for device in self.devices)
        self.owners = tuple(id(slot.owner) for slot in self.slots)
        self.active = self.slots
        # Copies: users may change the lists in place.
        self._sizes = [len(group["params"]) for group in groups]
        self._lists = [(list(group["params"]), _copy(group.get("param_names"))) for group in groups]
        self.options = self._current_options()
        self.remember_state()
        self._plain = can_watch_natively([slot.owner for slot in self.slots])
        self.native = self._runs_natively()
        self._owners = [slot.owner for slot in self.slots]
        self.watch = compiled("ParameterWatch")(self._owners) if self.native else PythonWatch(self._owners)

    def remember_state(self) -> None:
        """Makes the dictionaries that are in the state now those of the slots."""
        self._dictionaries = list(self._state.values())

    def register(self, slot: Slot) -> None:
        """Puts the slot's dictionary into the optimizer's state."""
        self._state[slot.owner] = slot.state

    def _runs_natively(self) -> bool:
        # Called at each step: set_backend may have been, too.
        return all([runs_natively(device, self._backend) for device in self.devices]) and self._plain

    def is_current(self, groups: Groups, state: Mapping[Tensor, dict], packing: PackedGradients | None) -> bool:
        """Whether groups, names and the state's dictionaries are those that this was made of, and the kernels too.

        The parameters themselves are compared by ``collect``.
        """
        return (
            state is self._state
            and packing is self.packing
            and len(groups) == len(self._groups)
            and all(map(is_, groups, self._groups))
            and len(state) == len(self._dictionaries)
            and all(map(is_, state.values(), self._dictionaries))
            and all(group.get("param_names") == names for group, (_, names) in zip(groups, self._lists, strict=True))
            and self._runs_natively() == self.native
        )

    def params(self) -> list[Tensor]:
        """The parameters that are in the groups now."""
        if len(self._groups) == 1 and isinstance(self._groups[0]["params"], list):
            return self._groups[0]["params"]
        return list(chain.from_iterable(group["params"] for group in self._groups))

    def has_other_params(self) -> bool:
        """Whether the groups' parameters, or the memory of the parameters, have changed."""
        return not (self._has_same_params() and self.watch.is_current())

    def _has_same_params(self) -> bool:
        params = self.params()
        sizes = [len(group["params"]) for group in self._groups]
        return sizes == self._sizes and all(map(is_, params, self._owners))

    def collect(self, masked_grads: MaskedGrads | None) -> bool:
        """Takes the gradients of a step; False if the parameters or their memory have changed.

        ``active`` are the parameters that have a gradient. Raises if one does not fit its parameter.
        """
        self.masked_grads = None
        masked: list[Tensor | None] = []
        if masked_grads is not None:
            masked = align_masked_grads(masked_grads, self.slots, self.names)
            if self.sharded:
                masked = [_local(grad) for grad in masked]
            self.masked_grads = masked
        if not self._has_same_params():
            return False
        self.update_packed()
        try:
            outcome = self.watch.collect(masked)
        except (RuntimeError, TypeError):
            # masked_grads has something that is not a tensor; the checks below name it.
            outcome = OTHER_GRADIENTS
        if outcome == OTHER_GRADIENTS:
            if self.packing is not None:
                self.packing.take_all()
                self.update_packed()
                self.active = [slot for slot in self.slots if slot.owner.grad is not None]
            else:
                self.active = with_gradients(self.slots, self.grads(), masked)
            present = {slot.position for slot in self.active}
            self.watch.expect([i in present for i in range(len(self.slots))])
            outcome = self.watch.collect(masked)
        return outcome == AS_EXPECTED

    def release(self) -> None:
        """Releases the gradients of a step."""
        self.masked_grads = None
        self.watch.release()

    def update_packed(self) -> None:
        """Takes the present packed gradients, if there are any."""
        if self.packing is None or self.packing.gradients is self._packed:
            return
        self._packed = gradients = self.packing.gradients
        found = [gradients.get(owner) for owner in self._owners]
        nothing = torch.empty(0)
        stand_ins = [nothing if g is None else g.stand_in if self.native else g.packed for g in found]
        self.watch.pack(stand_ins, [nothing if g is None else g.packed.entries for g in found])

    def grads(self) -> list[Tensor | None]:
        """The gradients, in the order of the parameters; of sharded ones this process's parts, of packed ones the
        entries."""
        grads = [_local(slot.owner.grad) for slot in self.slots]
        if self.packing is not None:
            grads = [None if grad is None else grad.entries for grad in grads]
        return grads

    def options_are_current(self) -> bool:
        """Whether the groups' options are unchanged. The learning rate is read at each step anyway."""
        return self._current_options() == self.options

    def read_options(self) -> None:
        """Takes the groups' present options."""
        self.options = self._current_options()

    def structure(self) -> list[tuple[bool, bool]]:
        """Which moments the groups' options ask for."""
        return [(group["betas"][0] != 0, group["amsgrad"]) for group in self._groups]

    def _current_options(self) -> list[tuple]:
        return [tuple(map(group.get, OPTIONS)) for group in self._groups]

    def old_names(self) -> Iterator[tuple[dict, list[Tensor], list[str] | None]]:
        """Each group with the parameters and names that it had."""
        for group, (params, names) in zip(self._groups, self._lists, strict=True):
            yield group, params, names

    def written(self) -> list[Slot]:
        """The parameters that other code has written to since the last step."""
        return [self.slots[i] for i in self.watch.written()]

    def record(self) -> None:
        """Makes the parameters' present values those of the last step."""
        self.watch.record()


def _local(tensor: Any) -> Any:
    return local(tensor) if isinstance(tensor, Tensor) else tensor


def _copy(names: list[str] | None) -> list[str] | None:
    return None if names is None else list(names)


def _names(groups: Groups, previous: Roster | None) -> list[list[str | None]]:
    """The names of each group's parameters.

    After an edit of ``params`` alone, positions in ``param_names`` no longer match. A parameter then keeps its earlier
    name, and one that replaces another takes over that one's name.
    """
    known: dict[int, str | None] = {}
    before: dict[int, tuple[list[Tensor], list[str] | None]] = {}
    if previous is not None:
        known = {id(slot.owner): slot.name for slot in previous.slots}
        before = {id(group): (params, names) for group, params, names in previous.old_names()}
    present = {id(param) for group in groups for param in group["params"]}
    result: list[list[str | None]] = []
    for group in groups:
        params, names = list(group["params"]), group.get("param_names")
        old_params, old_names = before.get(id(group), (None, None))
        same_params = old_params is not None and list(map(id, params)) == list(map(id, old_params))
        if names is not None and len(names) == len(params) and (same_params or names != old_names):
            result.append(list(names))
            continue
        own = [known.get(id(param)) for param in params]
        if old_params is not None and old_names is not None:
            for i, param in enumerate(params):
                replaced = i < len(old_params) and id(old_params[i]) not in present
                if own[i] is None and id(param) not in known and replaced:
                    own[i] = old_names[i]
        if names is not None and all(name is not None for name in own):
            # For state dicts.
            group["param_names"] = list(own)
        result.append(own)
    return result
