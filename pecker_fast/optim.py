"""MaskedAdam: Adam whose steps can be confined to the salient entries of the parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops
from .adam.alignment import MaskedGrads, align_masked_grads, check_grad
from .adam.checkpoint import restore_state, sharded_state, torch_groups, torch_state
from .adam.history import History
from .adam.nonfinite import count_nonfinite
from .adam.options import SHARED_OPTIONS, check_betas, check_group, check_options
from .adam.slots import Binding, Bucket, Slot
from .adam.statistics import sparsity_stats
from .flat import FlatView
from .mask import SaliencyMask
from .sharding import add_over, like, local


class MaskedAdam(Optimizer):
    r"""Adam (Kingma & Ba, 2015) and AdamW with steps confined to a saliency mask, in one fused multi-tensor pass.

    Without a mask it is a drop-in for ``torch.optim.Adam`` / ``AdamW`` (``decoupled_weight_decay=True``). With one:

    * ``step(mask=m)``: entries in the mask are updated; all others stay bit for bit what they were (parameter, moments
      and step count), which multiplying gradients by a mask does not achieve.
    * ``step(mask=m, masked_grads=f)``: PECKER's class-differentiated update. Every entry is updated with
      g = p.grad + (f where the mask is set, else 0); without ``mask``, f counts everywhere.

    The order of a step: unscale; g; non-finite policy; clip; maximize; weight decay; moments; update; EMA. Equations
    are in ``pecker_fast.ops.reference.masked_adam_``. Arithmetic and moments are float32 (float64 for float64
    parameters), whatever the parameters' dtype. A parameter is skipped if it has neither gradient.

    Masks are aligned with the parameters by identity, by name, or by order (``SaliencyMask.align``). The entries of a
    parameter share a step count until steps treat them differently; then it is kept per entry, so that an entry first
    updated late takes a first step of Adam's usual size.

    Sharded parameters (DTensor, as created by FSDP2) are updated in place: each process works on its shard, with the
    masks of local shards that ``saliency_mask`` returns. Only the non-finite policies communicate.

    Parameters
    ----------
    params : iterable
        Parameters, (name, parameter) pairs, or groups of them. Names let masks made elsewhere be aligned.
    lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay, maximize
        As in torch. lr may be a tensor. With ``betas[0] == 0`` no first moment is stored, read or written, and
        betas[0] cannot be changed later. A masked step decays salient entries only.
    capturable : bool
        Accepted as in torch. Step count, lr and scaling are always read on the device.
    clip_value : float, optional
        Clamp every entry of the gradient to +- clip_value, like ``clip_grad_value_``.
    ema_decay : float, optional
        Keep an EMA of the parameters in float32: ema += (1 - ema_decay) (p - ema) in each step.
    packed : bool
        Store moments for the entries of the mask only. Accepts masked steps only. A new mask repacks them: entries that
        stay keep moments and step count, entries that leave lose them.
    master_weights : bool
        Keep float32 copies of bfloat16 and float16 parameters, which take the updates first.
    stochastic_rounding : bool
        Without master weights: round bfloat16 and float16 parameters up or down at random, without bias, as a function
        of ``seed``, step, parameter and entry only.
    seed : int
        Seed of stochastic rounding.
    nonfinite : {"propagate", "skip", "zero", "raise"}
        For gradients with inf or NaN: torch's behaviour; skip the whole step; set these entries to zero; or raise
        FloatingPointError before anything is changed, which waits for the device. All but the first count them in
        ``nonfinite_count``.
    variance : {"combined", "retain"}
        "retain": in joint steps the second moment sees only p.grad.
    max_update : float, optional
        Clamp each entry's update to +- max_update * lr.
    backend : {"cuda", "triton", "cpu", "reference"}, optional
        By default the best one for the device.
    foreach, fused, differentiable
        Arguments of torch. The first two change nothing, the last is refused.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        From the constructor and from ``step``, before anything is changed.
    """

    # GradScaler hands over its scale and found_inf, as attributes, instead of waiting for the device itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        clip_value: float | None = None,
        ema_decay: float | None = None,
        packed: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        nonfinite: str = "propagate",
        variance: str = "combined",
        max_update: float | None = None,
        backend: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "clip_value": clip_value,
            "ema_decay": ema_decay,
            "max_update": max_update,
            "variance": variance,
            "packed": packed,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "nonfinite": nonfinite,
            "backend": backend,
        }
        check_options(defaults)
        self._forget_runtime()
        super().__init__(params, defaults)

    def _forget_runtime(self) -> None:
        """Drops everything that is derived from parameters and state; it is made again when needed."""
        self._slots: list[Slot] | None = None
        self._sharded = False
        self._owners: tuple[int, ...] = ()
        self._kinds: list[tuple[torch.dtype, torch.layout]] = []
        self._shapes: list[torch.Size] = []
        self._devices: list[torch.device] = []
        self._steps: dict[torch.device, Tensor] = {}
        self._buckets: list[Bucket] = []
        self._bucket_key: list[int] | None = None
        self._moments_checked: list[tuple[bool, bool]] | None = None
        self._bindings: dict[int, Binding] = {}
        self._past: History | None = None
        self._nonfinite: Tensor | None = None
        self._swapped = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; options that hold for the whole optimizer may not differ. The EMA starts at the parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self.defaults)
        except Exception:
            self.param_groups.pop()
            raise
        self._slots = None
        if group["ema_decay"] is not None:
            for slot in self._all_slots():
                if slot.group is group:
                    slot.start_ema()
                    if slot.owner is not slot.param and not slot.packed:
                        # Distributed checkpoints load what is there, and take any state for all of it.
                        slot.init_state(None)
                        slot.state["step"] = torch.zeros((), device=slot.param.device)

    # ---- parameters

    def _all_slots(self) -> list[Slot]:
        if self._slots is None:
            self._slots, self._buckets, self._bucket_key, self._steps, self._bindings = [], [], None, {}, {}
            for group in self.param_groups:
                names = group.get("param_names") or [None] * len(group["params"])
                for param, name in zip(group["params"], names, strict=True):
                    part = local(param)
                    view = FlatView(part)
                    copied = not view.is_contiguous and (group["packed"] or not view.is_dense)
                    state = self.state[param]
                    self._slots.append(Slot(part, param, name, group, state, len(self._slots), view, copied))
            self._sharded = any(slot.owner is not slot.param for slot in self._slots)
            self._owners = tuple(id(slot.owner) for slot in self._slots)
            self._kinds = [(slot.param.dtype, torch.strided) for slot in self._slots]
            self._shapes = [slot.param.shape for slot in self._slots]
            self._devices = [slot.param.device for slot in self._slots]
        return self._slots

    def _history(self) -> History:
        if self._past is None:
            self._past = History(self._all_slots())
        return self._past

    def _bind(self, mask: SaliencyMask, slots: list[Slot], active: list[Slot]) -> Binding:
        if not isinstance(mask, SaliencyMask):
            raise TypeError(f"mask is {type(mask).__name__}, expected a SaliencyMask (made by saliency_mask)")
        wanted, owners = slots, self._owners
        if len(active) < len(slots):
            needed = {slot.position for slot in active}
            wanted = [slot for slot in slots if slot.owner.requires_grad or slot.position in needed]
            owners = tuple(id(slot.owner) for slot in wanted)
        binding = self._bindings.get(id(mask))
        if binding is None or binding.params != owners:
            binding = Binding.make(mask, wanted)
            # The last two: alternating between two masks stays cheap, old masks are let go.
            self._bindings = {id(b.mask): b for b in list(self._bindings.values())[-1:]}
            self._bindings[id(mask)] = binding
        return binding

    # ---- the step

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        mask: SaliencyMask | None = None,
        masked_grads: MaskedGrads | None = None,
    ) -> Any:
        """Performs a plain, masked (``mask``) or joint (``masked_grads``) step; returns the closure's loss.

        ``masked_grads``: for each parameter a gradient or None, in the order of the parameters, or by name, or by
        parameter; of the parameter's shape and dtype, with the same loss scale as ``.grad``. Only read.
        """
        if self._swapped:
            raise RuntimeError("step() within swapped_ema(): the parameters are the EMA's at present")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Renamed in torch 2.14.
        getattr(self, "_accelerator_graph_capture_health_check", self._cuda_graph_capture_health_check)()
        joint = masked_grads is not None
        if self.defaults["packed"] and (mask is None or joint):
            raise ValueError("packed=True holds moments of salient entries only: it takes masked steps, step(mask=...)")
        # FSDP may replace the local parts of parameters, in the first forward pass after loading a state for instance.
        sharded = self._slots or () if self._sharded else ()
        replaced = any(local(slot.owner).data_ptr() != slot.param.data_ptr() for slot in sharded)
        if replaced or not all(bucket.is_current() for bucket in self._buckets):
            self._slots = None
        slots = self._all_slots()
        grads = [slot.owner.grad for slot in slots]
        forget = align_masked_grads(masked_grads, slots) if joint else []
        if self._sharded:
            grads, forget = ([g if g is None else local(g) for g in found] for found in (grads, forget))
        active = self._check_grads(slots, grads, forget)
        for group in self.param_groups:
            group["betas"] = check_betas(group["betas"])
        self._check_moments(active)
        binding = None if mask is None else self._bind(mask, slots, active)
        if not active:
            return loss
        kind = "masked" if mask is not None and not joint else "joint" if joint else "plain"
        found_inf = self._found_inf(active, grads, forget, binding, joint)
        if self._known_found_inf(found_inf, binding):
            return loss
        history = self._history()
        if history.enter(kind, binding, slots, self.defaults["backend"]):
            self._bucket_key = None
        buckets = self._current_buckets(active, binding if kind == "masked" else None)
        for bucket in buckets:
            bucket.count_step(found_inf)
            self._run(bucket, grads, forget, binding, kind, found_inf)
        if self.defaults["ema_decay"] is not None and len(active) < len(slots):
            self._follow([slot for slot in slots if slot not in active], found_inf)
        history.record(kind, mask)
        return loss

    def _check_grads(self, slots: list[Slot], grads: list[Tensor | None], forget: list[Tensor | None]) -> list[Slot]:
        """The parameters with a gradient. Raises if one does not fit its parameter."""
        # All at once where nothing is missing, as nearly always: a step has no time for work on each of many tensors.
        # (torch holds .grad to the parameter's shape and device when it is assigned.)
        complete = all(grad is not None for grad in grads)
        fits = complete and [(g.dtype, g.layout) for g in grads] == self._kinds
        if fits and forget:
            fits = all(isinstance(f, Tensor) for f in forget) and [f.shape for f in forget] == self._shapes
            fits = fits and [(f.dtype, f.layout) for f in forget] == self._kinds
            fits = fits and [f.device for f in forget] == self._devices
        if not fits:
            for what, tensors in (("the gradient", grads), ("masked_grads", forget)):
                for slot, grad in zip(slots, tensors, strict=False):
                    if grad is not None:
                        check_grad(what, grad, slot)
        if complete:
            return slots
        return [s for s in slots if grads[s.position] is not None or (forget and forget[s.position] is not None)]

    def _check_moments(self, active: list[Slot]) -> None:
        """Raises if the groups' options ask for moments that the state does not have."""
        wanted = [(group["betas"][0] != 0, group["amsgrad"]) for group in self.param_groups]
        if wanted != self._moments_checked:
            for slot in active:
                if "step" in slot.state:
                    slot.require_moments()
            self._bucket_key = None
            self._moments_checked = wanted

    def _known_found_inf(self, found_inf: Tensor | None, binding: Binding | None) -> bool:
        """Whether this step is to change nothing, where that can be told now: on the CPU, and where packed state is
        about to move to another mask, which waits for the device anyway."""
        if found_inf is None:
            return False
        repacks = self.defaults["packed"] and self._history().is_repacked_by(binding)
        return bool(found_inf != 0) if repacks or not found_inf.is_cuda else False

    def _found_inf(self, active, grads, forget, binding, joint) -> Tensor | None:
        """GradScaler's found_inf together with the optimizer's own policy; applies and reports that policy."""
        found_inf = getattr(self, "found_inf", None)
        policy = self.defaults["nonfinite"]
        if policy == "propagate":
            return found_inf
        scale, backend = getattr(self, "grad_scale", None), self.defaults["backend"]
        total = count_nonfinite(active, grads, forget if joint else None, binding, scale, backend)
        if self._sharded:
            # One decision for all parts.
            total = add_over(total, [slot.owner for slot in active])
        if policy == "raise":
            count = int(total)
            if count and not (found_inf is not None and bool(found_inf)):
                raise FloatingPointError(
                    f"{count} gradient entries are inf or NaN (nonfinite='raise'); nothing was changed"
                )
        self._nonfinite = total if self._nonfinite is None else self._nonfinite + total
        if policy == "skip":
            own = (total > 0).to(torch.float32)
            found_inf = own if found_inf is None else torch.maximum(own, found_inf.to(own))
        return found_inf

    @property
    def nonfinite_count(self) -> int:
        """inf and NaN gradient entries seen by all steps so far; 0 with nonfinite="propagate", which does not count."""
        return 0 if self._nonfinite is None else int(self._nonfinite)

    def _current_buckets(self, active: list[Slot], binding: Binding | None) -> list[Bucket]:
        """The lists for the kernel, made anew when parameters, state or the parameters with gradients changed."""
        key = [slot.position for slot in active]
        if key == self._bucket_key:
            return self._buckets
        if not self._steps:
            self._make_step_counters()
        counts = binding.mask.tensor_counts() if self.defaults["packed"] else None
        by_kind: dict[tuple, list[Slot]] = {}
        for slot in active:
            device = slot.param.device
            if "step" not in slot.state:
                slot.init_state(None if counts is None else counts[binding.positions[slot.position]])
                slot.state["step"] = self._steps[device][slot.position]
                if self._history().regime == "mixed":
                    slot.start_counts(None)
                if binding is not None and (self.defaults["packed"] or self._history().regime == "mask"):
                    slot.state["mask_words"] = binding.tensor_words(slot)
            elif slot.state["step"].untyped_storage().data_ptr() != self._steps[device].untyped_storage().data_ptr():
                # Somebody put another tensor there: its value counts.
                self._adopt_step(slot)
            by_kind.setdefault((id(slot.group), slot.param.device, slot.param.dtype), []).append(slot)
        self._buckets = [Bucket(slots, self._steps[slots[0].param.device]) for slots in by_kind.values()]
        self._bucket_key = key
        return self._buckets

    def _make_step_counters(self) -> None:
        """One vector of step counts a device; ``state[p]["step"]`` are its elements, so that one add advances all."""
        slots = self._all_slots()
        for device in {slot.param.device for slot in slots}:
            self._steps[device] = torch.zeros(len(slots), dtype=torch.float32, device=device)
        for slot in slots:
            if "step" in slot.state:
                self._adopt_step(slot)

    def _adopt_step(self, slot: Slot) -> None:
        counter = self._steps[slot.param.device][slot.position]
        counter.copy_(torch.as_tensor(slot.state["step"]))
        slot.state["step"] = counter

    def _run(self, bucket: Bucket, grads, forget, binding: Binding | None, kind: str, found_inf: Tensor | None) -> None:
        group = bucket.group
        masked = kind == "masked"
        if masked and group["ema_decay"] is not None and bucket.moved_outside():
            self._history().ema_follows = False
        if bucket.copied:
            bucket.gather_copied()
        scale = getattr(self, "grad_scale", None)
        history, lists = self._history(), bucket.lists
        ops.masked_adam_(
            bucket.params,
            bucket.flat(grads),
            bucket.flat(forget) if kind == "joint" else [],
            lists["exp_avg"],
            lists["exp_avg_sq"],
            lists["max_exp_avg_sq"],
            lists["master_param"],
            lists["ema"],
            lists["counts"],
            bucket.steps if bucket.whole else bucket.steps[bucket.index],
            bucket.learning_rate(),
            bucket.bias_table(),
            None if binding is None else binding.words,
            [] if binding is None else bucket.word_offsets(binding),
            bucket.block_offsets(binding, self.defaults["backend"]) if self.defaults["packed"] else None,
            None if scale is None else scale.to(bucket.device, torch.float32),
            None if found_inf is None else found_inf.to(bucket.device, torch.float32),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            clip_value=group["clip_value"],
            max_update=group["max_update"],
            retain_variance=group["variance"] == "retain" and kind == "joint",
            zero_nonfinite=self.defaults["nonfinite"] == "zero",
            ema_decay=group["ema_decay"],
            ema_frozen=masked and not (history.regime == "mask" and history.ema_follows),
            stochastic_rounding=self.defaults["stochastic_rounding"],
            seed=self.defaults["seed"],
            backend=self.defaults["backend"],
        )
        if bucket.copied:
            bucket.scatter_copied()
        bucket.record_versions()

    # ---- EMA

    @staticmethod
    def _follow(idle: list[Slot], found_inf: Tensor | None) -> None:
        """Moves the EMA of parameters that have no gradient in this step: it may still be behind them."""
        for slot in idle:
            ema, source = slot.state["ema"], slot.state.get("master_param", slot.param.detach())
            change = (1 - slot.group["ema_decay"]) * (source.to(ema.dtype) - ema)
            if found_inf is not None:
                change = torch.where(found_inf.to(ema.device) == 0, change, 0)
            ema.add_(change)

    def _require_ema(self) -> None:
        if self.defaults["ema_decay"] is None:
            raise RuntimeError("this optimizer keeps no EMA: construct it with ema_decay")

    def ema_parameters(self) -> list[Tensor]:
        """The EMA of every parameter, in order: float32 (float64 for float64 parameters), not copies, sharded as the
        parameters are."""
        self._require_ema()
        return [like(slot.state["ema"], slot.owner) for slot in self._all_slots()]

    @contextmanager
    @torch.no_grad()
    def swapped_ema(self) -> Iterator[None]:
        """Within this context the parameters hold the EMA's values; after it their own again, bit for bit."""
        self._require_ema()
        if self._swapped:
            raise RuntimeError("swapped_ema() within swapped_ema()")
        slots = self._all_slots()
        if any(bucket.moved_outside() for bucket in self._buckets):
            self._history().ema_follows = False
        own = [slot.param.detach().clone() for slot in slots]
        self._swapped = True
        try:
            for slot in slots:
                slot.param.detach().copy_(slot.state["ema"])
            yield
        finally:
            for slot, value in zip(slots, own, strict=True):
                slot.param.detach().copy_(value)
            for bucket in self._buckets:
                if bucket.versions is not None:
                    bucket.versions = [slot.param._version for slot in bucket.slots]
            self._swapped = False

    # ---- bookkeeping

    def sparsity_stats(self) -> dict[str, Any]:
        """Which entries the steps touched. Waits for the device.

        Returns a dict: "touched_last" and "touched_ever" (shares of all entries, by any update), "mean_update_count",
        "mask_density" (of the last mask, also of a joint step), "mask_iou" (last two different masks; None before
        there are two), "nonfinite" (entries counted), and "tensors": the first three for each parameter.
        """
        return sparsity_stats(self)

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.Adam's state dict, interchangeable both ways, when moments are dense and betas[0] != 0.

        What torch does not have comes under keys of its own: "ema", "master_param", "counts" (per-entry step counts),
        "mask_words" (of the one mask used so far, or the packed one).

        State of sharded parameters (DTensor) that has their shape is sharded like them, as distributed checkpoints want
        it. Words, and moments with packed=True, are this process's own: save them process by process.
        """
        found = super().state_dict()
        if not any(slot.owner is not slot.param for slot in self._all_slots()):
            return found
        ids = [i for group in found["param_groups"] for i in group["params"]]
        for i, slot in zip(ids, self._all_slots(), strict=True):
            if i in found["state"]:
                found["state"][i] = sharded_state(slot)
        return found

    def to_torch_state_dict(self) -> dict[str, Any]:
        """A state dict that ``torch.optim.Adam`` loads and goes on from: packed moments unpacked, zeros for the first
        moment where betas[0] == 0.

        Raises ValueError if entries of one parameter have had different numbers of updates.
        """
        packed = super().state_dict()
        uniform = self._history().regime != "mixed"
        ids = [i for group in packed["param_groups"] for i in group["params"]]
        states = {i: torch_state(slot, uniform) for i, slot in zip(ids, self._all_slots(), strict=True)}
        return {
            "state": {i: state for i, state in states.items() if state},
            "param_groups": torch_groups(packed["param_groups"]),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of MaskedAdam or of torch.optim.Adam / AdamW. Nothing changes if it does not fit.

        Options that hold for the whole optimizer stay this optimizer's own.
        """
        loaded: dict[str, Any] = {}
        # Runs after the user's hooks and sees what they made of the dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        before = dict(self.__dict__)
        self._loading = loaded
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.__dict__.update(before)
            raise
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = self.__dict__.get("_loading")
        super().__setstate__(state)
        self._forget_runtime()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            for name in SHARED_OPTIONS:
                group[name] = self.defaults[name]
            group["foreach"], group["fused"], group["differentiable"] = None, None, False
            if self.defaults["ema_decay"] is None:
                group["ema_decay"] = None
            elif group["ema_decay"] is None:
                group["ema_decay"] = self.defaults["ema_decay"]
        if loading is None:
            return
        # super() has cast the state as if all of it had the parameter's dtype; take it from the loaded dict instead.
        slots = self._all_slots()
        ids = [i for group in loading["param_groups"] for i in group["params"]]
        for i, slot in zip(ids, slots, strict=True):
            saved = loading["state"].get(i, {})
            slot.state.clear()
            slot.state.update(restore_state(slot, saved))
            if self.defaults["ema_decay"] is not None and "ema" not in slot.state:
                slot.start_ema()
            if "step" in slot.state and "master_param" not in slot.state:
                slot.start_master()
