"""The lists of tensors that one call of the kernel takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import ops
from .binding import Binding
from .roster import Roster
from .slots import MOMENTS, Slot
from .watch import compiled

# The lists of state, in the order of masked_adam_'s arguments.
_STATE_KEYS = (*MOMENTS, "master_param", "ema", "counts")


class _ByIdentity(TorchFunctionMode):
    """Tensors are equal to nothing but themselves.

    Comparing dictionaries is the fastest way to look at the many that hold the state. It calls ``==`` only for values
    that are not the same object, for which this mode answers.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return False


_BY_IDENTITY = _ByIdentity()


class Bucket:
    """Parameters of one group, device and dtype."""

    def __init__(self, slots: list[Slot], steps: Tensor, roster: Roster) -> None:
        self.slots = slots
        self.group = slots[0].group
        self.device = slots[0].param.device
        self._roster = roster
        self._compute = slots[0].compute
        self._positions = [slot.position for slot in slots]
        self._index = torch.tensor(self._positions, device=self.device)
        self._ones = torch.ones(len(slots), device=self.device)
        self._steps = steps
        self._whole = len(slots) == steps.numel()
        self._copied = [i for i, slot in enumerate(slots) if slot.copied]
        self._params = [slot.flat(slot.param.detach()) for slot in slots]
        self.lists = {key: self._flat_state(key) for key in _STATE_KEYS}
        # The tensors in the dictionaries now: the user may replace them.
        self._states = [slot.state for slot in slots]
        self._contents = [dict(state) for state in self._states]
        self._lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self._lr_value: float | None = None
        self._bias_table: tuple[tuple[float, float], Tensor] | None = None
        self._word_offsets: tuple[Binding, list[int]] | None = None
        self._block_offsets: tuple[Binding, Tensor] | None = None
        self._arguments: tuple | None = None
        self._plan = None
        if roster.native:
            orders = [[] if slot.copied or slot.view.is_contiguous else slot.view.order for slot in slots]
            lists = [self.lists[key] for key in _STATE_KEYS]
            packs = roster.packing is not None
            self._plan = compiled("AdamPlan")(self._positions, self._params, orders, lists, packs)
            self._plan.watch(self._state_tensors())
        else:
            self._memory = self._state_memory()

    def _flat_state(self, key: str) -> list[Tensor]:
        unused = {"exp_avg": self.group["betas"][0] == 0, "max_exp_avg_sq": not self.group["amsgrad"]}
        if unused.get(key) or not all(key in slot.state for slot in self.slots):
            return []
        return [
            slot.flat(slot.state[key]) if slot.state[key].shape == slot.param.shape else slot.state[key]
            for slot in self.slots
        ]

    def _state_tensors(self) -> list[Tensor]:
        keys = [key for key in ("step", *_STATE_KEYS) if key == "step" or self.lists[key]]
        return [state[key] for key in keys for state in self._states]

    def _state_memory(self) -> list[tuple]:
        return [(t.data_ptr(), t.dtype, t.stride()) for t in self._state_tensors()]

    def is_current(self) -> bool:
        """Whether the state still has the tensors that the lists were made from."""
        with _BY_IDENTITY:
            same = self._states == self._contents
        if not same:
            return False
        return self._plan.is_current() if self._plan is not None else self._state_memory() == self._memory

    # ---- arguments of the kernel

    def _learning_rate(self) -> Tensor:
        """The group's lr on the device, float64. A number is sent there only when it has changed."""
        lr = self.group["lr"]
        if isinstance(lr, Tensor):
            self._lr.copy_(lr.reshape(()), non_blocking=True)
            self._lr_value = None
        elif lr != self._lr_value:
            self._lr.fill_(lr)
            self._lr_value = lr
        return self._lr

    def _table(self) -> Tensor | None:
        """The bias corrections by step count, if counts are kept per entry."""
        if not self.lists["counts"]:
            return None
        betas = self.group["betas"]
        if self._bias_table is None or self._bias_table[0] != betas:
            self._bias_table = (betas, ops.bias_table(*betas, self._compute, self.device))
        return self._bias_table[1]

    def _offsets(self, binding: Binding | None) -> list[int]:
        if binding is None:
            return []
        if self._word_offsets is None or self._word_offsets[0] is not binding:
            self._word_offsets = (binding, [binding.offsets[slot.position] for slot in self.slots])
        return self._word_offsets[1]

    def _packed_offsets(self, binding: Binding, backend: str | None) -> Tensor:
        """For each block of ``PACK_BLOCK`` entries, the salient entries of its tensor before it: int64."""
        if self._block_offsets is None or self._block_offsets[0] is not binding:
            numels = [slot.param.numel() for slot in self.slots]
            counts = ops.block_counts(binding.words, self._offsets(binding), numels, backend=backend)
            before = counts.cumsum(0) - counts
            blocks = torch.tensor([ops.num_blocks(numel) for numel in numels], device=self.device)
            first = (blocks.cumsum(0) - blocks).clamp(max=max(counts.numel() - 1, 0))
            start = before[first] if counts.numel() else before.new_zeros(len(numels))
            self._block_offsets = (binding, before - start.repeat_interleave(blocks))
        return self._block_offsets[1]

    def _count_step(self, found_inf: Tensor | None) -> Tensor:
        """Adds one to the parameters' step counts, or nothing if ``found_inf`` is not zero; returns them."""
        ones = self._ones
        if found_inf is not None:
            ones = ones * (found_inf.to(self.device).reshape(()) == 0)
        if self._whole:
            return self._steps.add_(ones)
        self._steps.index_add_(0, self._index, ones)
        return self._steps[self._index]

    def _mask_arguments(self, binding: Binding | None) -> tuple:
        """bias_table, words, word_offsets and packed_offsets of masked_adam_."""
        packed = self.group["packed"]
        return (
            self._table(),
            None if binding is None else binding.words,
            self._offsets(binding),
            self._packed_offsets(binding, self.group["backend"]) if packed else None,
        )

    def _options(self, joint: bool, ema_everywhere: bool) -> dict[str, Any]:
        """The keyword arguments of masked_adam_, in the order of its schema."""
        group = self.group
        return {
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled_weight_decay": group["decoupled_weight_decay"],
            "maximize": group["maximize"],
            "clip_value": group["clip_value"],
            "max_update": group["max_update"],
            "retain_variance": group["variance"] == "retain" and joint,
            "zero_nonfinite": group["nonfinite"] == "zero",
            "ema_decay": group["ema_decay"],
            "ema_everywhere": ema_everywhere,
            "stochastic_rounding": group["stochastic_rounding"],
            "seed": group["seed"],
        }

    def run(
        self,
        binding: Binding | None,
        joint: bool,
        ema_everywhere: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """One step with the gradients that the roster has collected: joint if ``masked_grads`` are among them, plain
        without a mask (``binding``), otherwise masked."""
        watch = self._roster.watch
        for i in self._copied:
            # The options may have changed since.
            self._params[i].copy_(self.slots[i].param.detach())
        steps, lr = self._count_step(found_inf), self._learning_rate()
        scalars = [None if x is None else x.to(self.device, torch.float32) for x in (grad_scale, found_inf)]
        if self._plan is not None:
            arguments = (binding, joint, ema_everywhere, self._roster.options)
            if arguments != self._arguments:
                options = self._options(joint, ema_everywhere).values()
                self._plan.configure(joint, lr, *self._mask_arguments(binding), *options)
                self._arguments = arguments
            self._plan.run(watch, steps, *scalars)
        else:
            state = [self.lists[key] for key in _STATE_KEYS]
            grads, masked_grads = self._flat(watch.grads), self._flat(watch.masked_grads) if joint else []
            options = self._options(joint, ema_everywhere)
            ops.masked_adam_(
                self._params,
                grads,
                masked_grads,
                *state,
                steps,
                lr,
                *self._mask_arguments(binding),
                *scalars,
                **options,
                tensor_numbers=self._positions,
                backend=self.group["backend"],
            )
            watch.bump(self._positions)
        for i in self._copied:
            self.slots[i].param.detach().copy_(self._params[i])

    def _flat(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of these parameters, picked from those of all, as the kernel takes them."""
        picked = [(slot, tensors[slot.position]) for slot in self.slots]
        return [None if tensor is None else slot.flat(tensor) for slot, tensor in picked]
