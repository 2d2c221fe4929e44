"""What MaskedAdam keeps for each parameter, and the lists of tensors that one call of the kernel takes."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..flat import FlatView
from ..mask import SaliencyMask
from ..ops.reference import bias_correction_rows

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass(eq=False)
class Slot:
    """One parameter of the optimizer."""

    param: Tensor  # of a sharded parameter (DTensor) this process's part
    owner: Tensor  # the parameter itself
    name: str | None
    group: dict
    state: dict
    position: int  # among all parameters of the optimizer
    view: FlatView
    copied: bool  # the kernel works on a row-major copy: its memory has gaps, or packed state asks for row-major order

    @property
    def label(self) -> str:
        return self.name if self.name is not None else str(self.position)

    @property
    def packed(self) -> bool:
        return self.group["packed"]

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Zeros that lie in memory as the kernel sees the parameter."""
        layout = torch.contiguous_format if self.copied else torch.preserve_format
        return torch.zeros_like(self.param, dtype=dtype, memory_format=layout, requires_grad=False)

    def like_param(self, dtype: torch.dtype) -> Tensor:
        """The parameter's values in another dtype, lying in memory as the kernel sees the parameter."""
        return self.zeros(dtype).copy_(self.param.detach())

    def flat(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the parameter's shape, as the kernel wants it: contiguous, in the parameter's order."""
        if tensor.is_contiguous() and (self.copied or self.view.is_contiguous):
            return tensor
        return tensor.contiguous() if self.copied else self.view.flatten(tensor)

    def init_state(self, count: int | None) -> None:
        """Moments for the first step: of all entries, or of the ``count`` salient ones. The caller sets "step"."""
        compute = ops.compute_dtype(self.param.dtype)
        for key in MOMENTS:
            if key == "exp_avg" and self.group["betas"][0] == 0:
                continue
            if key == "max_exp_avg_sq" and not self.group["amsgrad"]:
                continue
            if count is None:
                self.state[key] = self.zeros(compute)
            else:
                self.state[key] = torch.zeros(count, dtype=compute, device=self.param.device)
        self.start_master()

    def start_ema(self) -> None:
        """The average begins at the parameter."""
        self.state["ema"] = self.like_param(ops.compute_dtype(self.param.dtype))

    def start_master(self) -> None:
        """So does the copy that takes the updates, where the group has one."""
        compute = ops.compute_dtype(self.param.dtype)
        if self.group["master_weights"] and compute != self.param.dtype:
            self.state["master_param"] = self.like_param(compute)

    def require_moments(self) -> None:
        """Raises if the state does not fit the group's options, as after ``betas[0]`` was moved away from 0."""
        if self.group["betas"][0] != 0 and "exp_avg" not in self.state:
            raise ValueError(
                f"betas[0] is {self.group['betas'][0]}, but parameter {self.label} has no first moment: "
                "it began with betas[0] = 0"
            )
        if self.group["amsgrad"] and "max_exp_avg_sq" not in self.state:
            raise ValueError(f"amsgrad is on, but parameter {self.label} began without it")

    def counts_dtype(self) -> torch.dtype:
        """The narrowest type that can count the steps until both bias corrections are 1."""
        rows = bias_correction_rows(*self.group["betas"], ops.compute_dtype(self.param.dtype))
        return torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32

    def start_counts(self, salient: Tensor | None) -> None:
        """Per-entry step counts: the shared count where ``salient`` (bool, the parameter's shape; None: everywhere)."""
        dtype = self.counts_dtype()
        step = self.state["step"].to(torch.int64).clamp(max=torch.iinfo(dtype).max).to(torch.int32)
        if self.packed:
            moments = self.state["exp_avg_sq"]
            self.state["counts"] = step.expand(moments.shape).to(dtype).contiguous()
            return
        counts = self.zeros(torch.int32)
        counts.copy_(step if salient is None else torch.where(salient, step, 0))
        self.state["counts"] = counts.to(dtype, memory_format=torch.preserve_format)

    def repack(self, old_words: Tensor, new_words: Tensor, count: int, backend: str | None) -> None:
        """Moves packed state to another mask: entries in both keep theirs, new ones begin at zero."""
        numel = self.param.numel()
        for key in (*MOMENTS, "counts"):
            if key in self.state:
                dense = ops.unpack(self.state[key], old_words, numel, backend=backend)
                self.state[key] = ops.pack(dense, new_words, count, backend=backend)
        # Packed state forgets the entries that leave; that they were touched is kept for the statistics.
        self.state["touched_words"] = self.state.get("touched_words", old_words) | new_words


@dataclass
class Binding:
    """A mask as the kernel takes it: words, and where those of each parameter (by position) start."""

    mask: SaliencyMask
    params: tuple[int, ...]  # id of each aligned parameter, in order
    positions: dict[int, int]  # parameter position -> tensor of the mask
    words: Tensor
    offsets: dict[int, int]

    @classmethod
    def make(cls, mask: SaliencyMask, slots: list[Slot]) -> "Binding":
        names = [slot.name for slot in slots]
        found = mask.align([slot.owner for slot in slots], None if None in names else names)
        words, offsets, extra = mask.words, {}, mask.words.numel()
        reordered = []
        for slot, tensor in zip(slots, found, strict=True):
            if slot.copied or slot.view.is_contiguous:
                offsets[slot.position] = mask.word_offsets[tensor]
            else:
                # The kernel sees this parameter in storage order, so it needs the mask in that order too.
                reordered.append(mask.words_in_storage_order(tensor, slot.view))
                offsets[slot.position] = extra
                extra += reordered[-1].numel()
        if reordered:
            words = torch.cat([words, *reordered])
        positions = {slot.position: tensor for slot, tensor in zip(slots, found, strict=True)}
        return cls(mask, tuple(id(slot.owner) for slot in slots), positions, words, offsets)

    def tensor_words(self, slot: Slot) -> Tensor:
        """The mask's words of this parameter, in row-major order."""
        return self.mask.tensor_words(self.positions[slot.position])


class Bucket:
    """Parameters of one group, device and dtype, as lists for one call of the kernel."""

    def __init__(self, slots: list[Slot], steps: Tensor) -> None:
        self.slots = slots
        self.group = slots[0].group
        self.device = slots[0].param.device
        self.dtype = slots[0].param.dtype
        self.compute = ops.compute_dtype(self.dtype)
        self.index = torch.tensor([slot.position for slot in slots], device=self.device)
        self.ones = torch.ones(len(slots), device=self.device)
        self.whole = len(slots) == steps.numel()
        self.steps = steps
        self.copied = [slot for slot in slots if slot.copied]
        self.params = [slot.flat(slot.param.detach()) for slot in slots]
        self.lists = {
            key: [slot.flat(slot.state[key]) if slot.state[key].dim() != 1 else slot.state[key] for slot in slots]
            if all(key in slot.state for slot in slots)
            else []
            for key in (*MOMENTS, "master_param", "ema", "counts")
        }
        if self.group["betas"][0] == 0:
            self.lists["exp_avg"] = []
        if not self.group["amsgrad"]:
            self.lists["max_exp_avg_sq"] = []
        self.states = [slot.state for slot in slots]
        self.owned = [slot.param for slot in slots]
        self.pointers = [param.data_ptr() for param in self.owned]
        self.sharded = [slot for slot in slots if slot.owner is not slot.param]
        self.held = {key: [state[key] for state in self.states] for key in ("step", "exp_avg_sq")}
        # Nothing to do but to hand gradients on: the usual case, kept free of work for each tensor.
        self.plain_layout = all(slot.view.is_contiguous for slot in slots)
        self.versions: list[int] | None = None
        self.lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self.lr_value: float | None = None
        self.table: Tensor | None = None
        self.table_betas: tuple[float, float] | None = None
        self.offsets: tuple[Binding, list[int]] | None = None
        self.packed_offsets: tuple[Binding, Tensor] | None = None

    def is_current(self) -> bool:
        """Whether parameters and state are still the tensors that the lists were made of."""
        return [param.data_ptr() for param in self.owned] == self.pointers and all(
            all(map(operator.is_, [state.get(key) for state in self.states], tensors))
            for key, tensors in self.held.items()
        )

    def flat(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of these parameters, picked from a list by position, as the kernel wants them."""
        picked = list(tensors) if self.whole else [tensors[slot.position] for slot in self.slots]
        if self.plain_layout:
            return [t if t is None or t.is_contiguous() else t.contiguous() for t in picked]
        return [None if t is None else slot.flat(t) for slot, t in zip(self.slots, picked, strict=True)]

    def learning_rate(self) -> Tensor:
        """The group's lr on the device, float64. A number is sent there only when it has changed."""
        lr = self.group["lr"]
        if isinstance(lr, Tensor):
            self.lr.copy_(lr.reshape(()), non_blocking=True)
            self.lr_value = None
        elif lr != self.lr_value:
            self.lr.fill_(lr)
            self.lr_value = lr
        return self.lr

    def bias_table(self) -> Tensor | None:
        """The bias corrections by step count, where counts are kept per entry."""
        if not self.lists["counts"]:
            return None
        if self.table_betas != self.group["betas"]:
            self.table = ops.bias_table(*self.group["betas"], self.compute, self.device)
            self.table_betas = self.group["betas"]
        return self.table

    def word_offsets(self, binding: Binding) -> list[int]:
        if self.offsets is None or self.offsets[0] is not binding:
            self.offsets = (binding, [binding.offsets[slot.position] for slot in self.slots])
        return self.offsets[1]

    def block_offsets(self, binding: Binding, backend: str | None) -> Tensor:
        """For each block of ``PACK_BLOCK`` entries, the salient entries of its tensor before it: int64."""
        if self.packed_offsets is None or self.packed_offsets[0] is not binding:
            numels = [slot.param.numel() for slot in self.slots]
            counts = ops.block_counts(binding.words, self.word_offsets(binding), numels, backend=backend)
            before = counts.cumsum(0) - counts
            blocks = torch.tensor([ops.num_blocks(numel) for numel in numels], device=self.device)
            first = (blocks.cumsum(0) - blocks).clamp(max=max(counts.numel() - 1, 0))
            start = before[first] if counts.numel() else before.new_zeros(len(numels))
            self.packed_offsets = (binding, before - start.repeat_interleave(blocks))
        return self.packed_offsets[1]

    def gather_copied(self) -> None:
        """Reads the parameters that the kernel sees as copies; they may have changed since."""
        for i, slot in enumerate(self.slots):
            if slot.copied:
                self.params[i].copy_(slot.param.detach())

    def scatter_copied(self) -> None:
        """Writes the updated copies back."""
        for i, slot in enumerate(self.slots):
            if slot.copied:
                slot.param.detach().copy_(self.params[i])

    def count_step(self, found_inf: Tensor | None) -> None:
        """Adds one to the parameters' step counts, or nothing where ``found_inf`` is not zero."""
        ones = self.ones
        if found_inf is not None:
            ones = ones * (found_inf.to(self.device).reshape(()) == 0)
        if self.whole:
            self.steps.add_(ones)
        else:
            self.steps.index_add_(0, self.index, ones)

    def moved_outside(self) -> bool:
        """Whether something else has written to a parameter since the last step."""
        return self.versions is not None and self.versions != [param._version for param in self.owned]

    def record_versions(self) -> None:
        """Tells autograd that the parameters were written to, and remembers that it was this step that did it."""
        torch.autograd.graph.increment_version([*self.owned, *(slot.owner for slot in self.sharded)])
        if self.lists["ema"]:
            self.versions = [param._version for param in self.owned]
