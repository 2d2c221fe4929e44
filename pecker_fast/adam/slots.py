"""MaskedAdam's state of each parameter, and its memory layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..entries import put_entries, take_entries
from ..flat import FlatView, row_major
from ..ops.reference import bias_correction_rows

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# Copies of the parameter: outside the mask of packed state they equal it.
COPIES = ("master_param", "ema")
PER_ENTRY = (*MOMENTS, "counts", *COPIES)
COUNT_DTYPES = (torch.int16, torch.int32)


@dataclass(eq=False)
class Slot:
    """One parameter of the optimizer."""

    param: Tensor  # of a sharded parameter (DTensor) this process's part
    owner: Tensor  # the parameter itself
    name: str | None
    group: dict
    state: dict  # the optimizer's for this parameter, once there is something in it
    position: int  # among all parameters of the optimizer
    view: FlatView
    copied: bool  # the kernel works on a row-major copy: its memory has gaps, or packed state asks for row-major order

    @property
    def label(self) -> str:
        return self.name if self.name is not None else str(self.position)

    @property
    def packed(self) -> bool:
        return self.group["packed"]

    @property
    def compute(self) -> torch.dtype:
        """The dtype of moments, masters and averages."""
        return ops.compute_dtype(self.param.dtype)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Zeros in the memory order in which the kernel sees the parameter."""
        layout = torch.contiguous_format if self.copied else torch.preserve_format
        return torch.zeros_like(self.param, dtype=dtype, memory_format=layout, requires_grad=False)

    def like_param(self, dtype: torch.dtype) -> Tensor:
        """The parameter's values in another dtype, in the memory order in which the kernel sees the parameter."""
        return self.zeros(dtype).copy_(self.param.detach())

    def flat(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the parameter's shape, in the form for the kernel: contiguous, in the parameter's order."""
        return row_major(tensor) if self.copied or self.view.is_contiguous else self.view.flatten(tensor)

    # ---- packed state

    def salient(self, tensor: Tensor, words: Tensor | None = None, count: int | None = None) -> Tensor:
        """The salient entries of ``tensor``, which has the parameter's shape: by default those of the packed state."""
        if words is None:
            words, count = self.state["mask_words"], self.state["exp_avg_sq"].numel()
        return take_entries(tensor, words, count, self.group["backend"])

    def put_salient(self, tensor: Tensor, values: Tensor) -> None:
        """Sets the salient entries of ``tensor``, which has the parameter's shape, to packed ``values``."""
        put_entries(tensor, self.state["mask_words"], values, self.group["backend"])

    def has_packed(self, key: str) -> bool:
        """Whether the state has ``key`` for the salient entries only."""
        # State of older versions has packed moments only; the next step packs the rest.
        return self.packed and key in self.state and self.state[key].shape != self.param.shape

    def whole(self, key: str) -> Tensor:
        """The master or the average of every entry: the state itself, or if it is packed, a new tensor."""
        if key in self.state and not self.has_packed(key):
            return self.state[key]
        result = self.like_param(self.compute)
        if key in self.state:
            self.put_salient(result, self.state[key])
        return result

    # ---- the start

    def init_state(self, count: int | None) -> None:
        """Moments for the first step: of all entries, or of the ``count`` salient ones. The caller sets "step"."""
        for key in self.wanted_moments():
            if count is None:
                self.state[key] = self.zeros(self.compute)
            else:
                self.state[key] = torch.zeros(count, dtype=self.compute, device=self.param.device)
        self.start_master()

    def wanted_moments(self) -> list[str]:
        """The moments that the group's options ask for."""
        wanted = {"exp_avg": self.group["betas"][0] != 0, "exp_avg_sq": True, "max_exp_avg_sq": self.group["amsgrad"]}
        return [key for key in MOMENTS if wanted[key]]

    def _start_copy(self, key: str) -> None:
        if not self.packed:
            self.state[key] = self.like_param(self.compute)
        elif "exp_avg_sq" in self.state:
            # Which entries are salient is known from the first step on.
            self.state[key] = self.salient(self.param).to(self.compute)

    def start_ema(self) -> None:
        """The average begins at the parameter."""
        self._start_copy("ema")

    def start_master(self) -> None:
        """The master, if the group has one, begins at the parameter too."""
        if self.group["master_weights"] and self.compute != self.param.dtype:
            self._start_copy("master_param")

    def refresh_master(self) -> None:
        """Copies entries of the parameter that other code has written to into the master."""
        master = self.state.get("master_param")
        if master is not None:
            param = self.salient(self.param) if self.has_packed("master_param") else self.param.detach()
            master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(master.dtype)))

    def require_complete(self) -> None:
        """Raises ValueError if the state lacks something that the group's options ask for."""
        if "step" not in self.state:
            extra = next((key for key in (*MOMENTS, "counts") if key in self.state), None)
            if extra is not None:
                raise ValueError(
                    f'the state of parameter {self.label} has "{extra}" but no "step": set it, or clear it'
                )
            return
        missing = next((key for key in self.wanted_moments() if key not in self.state), None)
        if missing == "exp_avg":
            raise ValueError(
                f"betas[0] is {self.group['betas'][0]}, but parameter {self.label} has no first moment: "
                "it began with betas[0] = 0"
            )
        if missing == "max_exp_avg_sq":
            raise ValueError(f"amsgrad is on, but parameter {self.label} began without it")
        if missing is not None:
            raise ValueError(f'the state of parameter {self.label} has no "{missing}": set it, or clear the state')
        if self.packed and isinstance(self.state["exp_avg_sq"], Tensor):
            size = self.state["exp_avg_sq"].shape
            for key in PER_ENTRY:
                self._check_shape(key, self.param.shape if self._is_dense_copy(key) else size)

    def _is_dense_copy(self, key: str) -> bool:
        return key in COPIES and key in self.state and not self.has_packed(key)

    def _check_shape(self, key: str, expected: torch.Size) -> None:
        value = self.state.get(key)
        if isinstance(value, Tensor) and value.shape != expected:
            raise ValueError(
                f"{key} of parameter {self.label} has shape {tuple(value.shape)}, expected {tuple(expected)}"
            )

    def conform(self, count: int | None) -> None:
        """Brings tensors of the state into the dtype, device and memory order that the kernel takes, in place.

        Users may have replaced them, or changed the parameter's memory format. ``count``: the salient entries of packed
        state. Raises ValueError or TypeError if a tensor has another shape.
        """
        packed = self.packed
        for key in PER_ENTRY:
            value = self.state.get(key)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{key} of parameter {self.label} is {type(value).__name__}, expected a tensor")
            if packed and count is not None and self._is_dense_copy(key):
                value = self.state[key] = self.salient(value, self.state["mask_words"], count)
            shape = torch.Size((count,)) if packed and count is not None else self.param.shape
            self._check_shape(key, shape)
            dtype = self.compute
            if key == "counts":
                dtype = value.dtype if value.dtype in COUNT_DTYPES else self.counts_dtype()
            lies_well = value.is_contiguous() if packed or self.copied else self.view.matches(value)
            if value.dtype != dtype or value.device != self.param.device or not lies_well:
                target = torch.empty(shape, dtype=dtype, device=self.param.device) if packed else self.zeros(dtype)
                # In place, so that other references to the tensor keep seeing the state.
                value.data = target.copy_(value)
        if self.compute == self.param.dtype:
            self.state.pop("master_param", None)

    def counts_dtype(self) -> torch.dtype:
        """The narrowest type that can count the steps until both bias corrections are 1."""
        rows = bias_correction_rows(*self.group["betas"], self.compute)
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
        """Moves packed state to another mask: entries in both keep their state, new ones begin afresh."""
        numel = self.param.numel()
        for key in PER_ENTRY:
            if key not in self.state:
                continue
            if key in COPIES:
                # Entries that leave the mask become equal to the parameter, new ones begin at it.
                dense = row_major(self.whole(key))
            else:
                dense = ops.unpack(self.state[key], old_words, numel, backend=backend)
            self.state[key] = ops.pack(dense, new_words, count, backend=backend)
        # Packed state drops the entries that leave; the statistics still remember that they were touched.
        self.state["touched_words"] = self.state.get("touched_words", old_words) | new_words
