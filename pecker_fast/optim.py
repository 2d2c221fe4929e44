"""MaskedAdam: Adam whose steps can be confined to the salient entries of the parameters."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .adam import averages
from .adam.alignment import MaskedGrads
from .adam.checkpoint import restore_state, sharded_state, torch_groups, torch_state
from .adam.history import History
from .adam.hooks import with_hooks
from .adam.options import SHARED_OPTIONS, check_group, check_options, fill_options
from .adam.packing import PackedGradients, pack_gradients
from .adam.runtime import Runtime
from .adam.slots import Slot
from .adam.statistics import sparsity_stats
from .mask import SaliencyMask
from .sharding import is_sharded, like

__all__ = ["MaskedAdam", "PackedGradients", "pack_gradients"]

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


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

    Parameters
    ----------
    params : iterable
        Parameters, (name, parameter) pairs, or groups of them. Names let masks made elsewhere be aligned.
    lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay, maximize
        As in torch. lr may be a tensor. With ``betas[0] == 0`` no first moment is stored, read or written, and it may
        not be changed to another value later. A masked step decays salient entries only.
    capturable : bool
        Accepted as in torch. The step count, lr and scaling are always read on the device.
    clip_value : float, optional
        Clamp every entry of the gradient to +- clip_value, as ``clip_grad_value_`` does.
    ema_decay : float, optional
        Keep an EMA of the parameters in float32: ema += (1 - ema_decay) (p - ema), each step. It starts at the
        parameters as they are when the optimizer gets them.
    packed : bool
        Store moments, EMA and float32 masters of the mask's entries only. Accepts masked steps only. Outside the mask
        the EMA is the parameter, which does not move. A new mask re-packs: entries that stay keep their state, those
        that leave lose it, new ones begin with zero moments and with EMA and master at the parameter. The EMA starts
        at the first step. ``pack_gradients`` packs the gradients too.
    master_weights : bool
        Keep float32 copies of bfloat16 and float16 parameters, which updates go to first. An entry of a parameter that
        somebody else writes to becomes its master's value; a write through ``.data`` passes unnoticed.
    stochastic_rounding : bool
        Without master weights: round bfloat16 and float16 parameters up or down at random, right in expectation; a
        function of ``seed``, step, parameter and entry only.
    nonfinite : {"propagate", "skip", "zero", "raise"}
        For gradients with inf or NaN: do as torch does, skip the whole step, zero these entries, or raise
        FloatingPointError before anything is changed (waits for the device). All but the first count them:
        ``nonfinite_count``.
    variance : {"combined", "retain"}
        "retain": in joint steps the second moment sees p.grad's part only.
    max_update : float, optional
        Clamp each entry's update to +- max_update * lr.
    backend : {"cuda", "triton", "cpu", "reference"}, optional
        None: the best one for the device.
    foreach, fused, differentiable
        torch's arguments. The first two change nothing, the last is refused.

    Notes
    -----
    ``param_groups`` and ``state`` may be edited as those of a torch optimizer, and parameters may be moved, cast or get
    another memory format: the next step notices.

    Sharded parameters (DTensor, as FSDP2 makes them) are updated where they are: each process works on its part, with
    masks of the local parts, as ``saliency_mask`` gives them; only the non-finite policies talk to other processes.

    Masks are aligned with the parameters by identity, by name, or by order (``SaliencyMask.align``). Step counts are
    shared by a parameter's entries until steps treat them differently, then kept per entry, so that an entry first
    touched late takes a first step of Adam's usual size.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        From the constructor and from ``step``, before anything is changed.
    """

    # GradScaler hands over its scale and found_inf, as attributes, instead of waiting for the device itself.
    _step_supports_amp_scaling = True

    # Not part of what is copied or pickled: see set_mask.
    _mask: SaliencyMask | None = None
    _masked_grads: MaskedGrads | None = None
    _packing: PackedGradients | None = None

    def __init__(
        self,
        params: Params,
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
        nonfinite: Literal["propagate", "skip", "zero", "raise"] = "propagate",
        variance: Literal["combined", "retain"] = "combined",
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
        self._swapped = False
        self._runtime: Runtime | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; options that hold for the whole optimizer may not differ. The EMA starts at the parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self.defaults)
        except Exception:
            self.param_groups.pop()
            raise
        if group["ema_decay"] is not None:
            self._renewed_runtime().start_averages(group)
        if self._packing is not None:
            self._packing.add_hooks()

    # ---- parameters

    def _renewed_runtime(self) -> Runtime:
        self._runtime = Runtime(self, self._runtime)
        return self._runtime

    def _current_runtime(self) -> Runtime:
        """What is derived from groups and state as they are now. Their parameters' memory is not looked at."""
        if self._runtime is None or not self._runtime.is_current(self):
            return self._renewed_runtime()
        return self._runtime

    def _slots(self) -> list[Slot]:
        """The parameters as they are now."""
        runtime = self._current_runtime()
        return (self._renewed_runtime() if runtime.roster.has_other_params() else runtime).slots

    @property
    def _active_packing(self) -> PackedGradients | None:
        """The packing of gradients. Without a mask, they are dense."""
        return None if self._mask is None else self._packing

    def _history(self) -> History:
        return self._current_runtime().history

    # ---- the step

    def set_mask(self, mask: SaliencyMask | None, *, masked_grads: MaskedGrads | None = None) -> None:
        """Sets what ``step()`` without ``mask`` and ``masked_grads`` takes for them.

        For code that calls ``step()`` itself, such as the optimizers that ``accelerate`` prepares: keep the MaskedAdam
        that you gave to ``prepare``, and set the mask on it before ``prepared.step()``.

        Parameters
        ----------
        mask : SaliencyMask or None
            For all steps from now on; None: no mask any more.
        masked_grads : optional
            For the next step only; see ``step``.
        """
        if mask is not None and not isinstance(mask, SaliencyMask):
            raise TypeError(f"mask is {type(mask).__name__}, expected a SaliencyMask (made by saliency_mask)")
        self._mask, self._masked_grads = mask, masked_grads

    @with_hooks
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        mask: SaliencyMask | None = None,
        masked_grads: MaskedGrads | None = None,
    ) -> Any:
        """Performs a plain, masked (``mask``) or joint (``masked_grads``) step.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and the gradients again, as in torch.
        mask : SaliencyMask, optional
            The entries to update, or to add ``masked_grads`` at.
        masked_grads : optional
            For each parameter a gradient or None: in the order of the parameters, or a mapping by name or by parameter;
            of the parameter's shape and dtype, with the same loss scale as ``.grad``. Only read.

        Returns
        -------
        Any
            What the closure returned.

        Raises
        ------
        ValueError, TypeError, RuntimeError
            If mask, gradients, options or state do not fit; nothing is changed then.
        """
        if self._swapped:
            raise RuntimeError("step() within swapped_ema(): the parameters are the EMA's at present")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if mask is None and masked_grads is None:
            mask, masked_grads = self._mask, self._masked_grads
        kind = "joint" if masked_grads is not None else "plain" if mask is None else "masked"
        if self.defaults["packed"] and kind != "masked":
            raise ValueError("packed=True holds moments of salient entries only: it takes masked steps, step(mask=...)")
        if isinstance(masked_grads, Iterator):
            # They may be looked at twice.
            masked_grads = list(masked_grads)
        if self._active_packing is not None:
            self._active_packing.use(mask)
        runtime = self._current_runtime()
        if not runtime.collect(masked_grads):
            runtime = self._renewed_runtime()
            if not runtime.collect(masked_grads):
                raise RuntimeError("the parameters changed during step()")
        if runtime.roster.may_be_captured:
            # Renamed in torch 2.14.
            getattr(self, "_accelerator_graph_capture_health_check", self._cuda_graph_capture_health_check)()
        try:
            runtime.step(self, kind, mask)
        finally:
            runtime.roster.release()
        self._masked_grads = None
        return loss

    @property
    def nonfinite_count(self) -> int:
        """inf and NaN gradient entries seen by all steps so far; 0 with nonfinite="propagate", which does not count."""
        total = self._runtime.nonfinite if self._runtime is not None else None
        return 0 if total is None else int(total)

    # ---- EMA

    def _require_ema(self) -> None:
        if self.defaults["ema_decay"] is None:
            raise RuntimeError("this optimizer keeps no EMA: construct it with ema_decay")

    def ema_parameters(self) -> list[Tensor]:
        """The EMA of every parameter, in order.

        Returns
        -------
        list of Tensor
            float32 (float64 for float64 parameters), sharded as the parameters are. The optimizer's own tensors; with
            packed=True, new ones.
        """
        self._require_ema()
        return [like(slot.whole("ema"), slot.owner) for slot in self._slots()]

    @contextmanager
    @torch.no_grad()
    def swapped_ema(self) -> Iterator[None]:
        """Within this context the parameters hold the EMA's values; after it their own again, bit for bit."""
        self._require_ema()
        if self._swapped:
            raise RuntimeError("swapped_ema() within swapped_ema()")
        slots = self._slots()
        runtime = self._current_runtime()
        runtime.notice_writes()
        self._swapped = True
        try:
            with averages.swapped(slots):
                yield
        finally:
            runtime.roster.record()
            self._swapped = False

    # ---- bookkeeping

    def sparsity_stats(self) -> dict[str, Any]:
        """Which entries the steps touched. Waits for the device.

        Returns
        -------
        dict
            "touched_last" and "touched_ever" (shares of all entries, by any update), "mean_update_count",
            "mask_density" (of the last mask, also of a joint step), "mask_iou" (last two different masks; None before
            there are two), "nonfinite" (entries counted), and "tensors": the first three for each parameter.
        """
        return sparsity_stats(self)

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.Adam's state dict, interchangeable both ways, when moments are dense and betas[0] != 0.

        What torch does not have comes under keys of its own: "ema", "master_param", "counts" (per-entry step counts),
        "mask_words" (of the one mask used so far, or the packed one).

        State of sharded parameters (DTensor) that has their shape is sharded like them, as distributed checkpoints want
        it. Words, and all state with packed=True, are this process's own: save them process by process.
        """
        slots = self._slots()
        result = super().state_dict()
        if any(is_sharded(slot.owner) for slot in slots):
            ids = [i for group in result["param_groups"] for i in group["params"]]
            for i, slot in zip(ids, slots, strict=True):
                if i in result["state"]:
                    result["state"][i] = sharded_state(slot)
        return result

    def to_torch_state_dict(self) -> dict[str, Any]:
        """A state dict that ``torch.optim.Adam`` loads and goes on from: packed moments unpacked, zeros for the first
        moment where betas[0] == 0.

        Raises
        ------
        ValueError
            If entries of one parameter have had different numbers of updates.
        """
        slots = self._slots()
        own = super().state_dict()
        uniform = self._history().regime != "mixed"
        ids = [i for group in own["param_groups"] for i in group["params"]]
        states = {i: torch_state(slot, uniform) for i, slot in zip(ids, slots, strict=True)}
        return {
            "state": {i: state for i, state in states.items() if state},
            "param_groups": torch_groups(own["param_groups"]),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of MaskedAdam or of torch.optim.Adam / AdamW. Nothing changes if it does not fit.

        Options that hold for the whole optimizer stay this optimizer's own.
        """
        loaded: dict[str, Any] = {}
        # Runs after the user's hooks and sees what they made of the dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, state: loaded.update(state))
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
        self._runtime, self._swapped = None, False
        for group in self.param_groups:
            fill_options(group, self.defaults)
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
        self.state.clear()
        runtime = self._renewed_runtime()
        ids = [i for group in loading["param_groups"] for i in group["params"]]
        for i, slot in zip(ids, runtime.slots, strict=True):
            slot.state.update(restore_state(slot, loading["state"].get(i, {})))
            if self.defaults["ema_decay"] is not None and "ema" not in slot.state:
                slot.start_ema()
            if "step" in slot.state and "master_param" not in slot.state:
                slot.start_master()
            if slot.state:
                runtime.roster.register(slot)
        # The history of steps is read off the state.
        self._runtime = None
