"""Gradients given to a step beside those in ``.grad``: which parameter each belongs to, and whether it fits."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..flat import describe
from ..mask import plain_name
from .slots import Slot

MaskedGrads = Mapping[str, Tensor] | Mapping[Tensor, Tensor] | Iterable[Tensor | None]


def align_masked_grads(masked_grads: MaskedGrads, slots: list[Slot]) -> list[Tensor | None]:
    """One gradient or None for each parameter: from a mapping by name or by parameter, or in the parameters' order."""
    if isinstance(masked_grads, Tensor):
        raise TypeError("masked_grads is one tensor, expected one gradient (or None) for each parameter")
    if not isinstance(masked_grads, Mapping):
        found = list(masked_grads)
        if len(found) != len(slots):
            raise ValueError(f"masked_grads has {len(found)} entries, the optimizer {len(slots)} parameters")
        return found
    if all(isinstance(key, str) for key in masked_grads):
        if any(slot.name is None for slot in slots):
            raise ValueError("masked_grads has names, the optimizer has none: give it model.named_parameters()")
        remaining = {plain_name(key): grad for key, grad in masked_grads.items()}
        found = [remaining.pop(plain_name(slot.name), None) for slot in slots]
        unknown = next(iter(remaining), None)
    else:
        remaining = {id(key): grad for key, grad in masked_grads.items()}
        found = [remaining.pop(id(slot.owner), None) for slot in slots]
        unknown = "a parameter" if remaining else None
    if unknown is not None:
        raise ValueError(f"masked_grads has a gradient for {unknown}, which this optimizer does not have")
    return found


def check_grad(what: str, grad: Tensor, slot: Slot) -> None:
    """Raises if ``grad`` (the gradient or masked_grads, ``what``) cannot be that of the parameter."""
    param = slot.param
    if not isinstance(grad, Tensor):
        raise TypeError(f"{what} of parameter {slot.label} is {type(grad).__name__}, expected a tensor or None")
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{what} of parameter {slot.label} is sparse: MaskedAdam does not support sparse gradients, "
            "make them dense with grad.to_dense()"
        )
    if grad.shape != param.shape or grad.dtype != param.dtype or grad.device != param.device:
        raise ValueError(
            f"{what} of parameter {slot.label} is a {describe(grad)} on {grad.device}, "
            f"the parameter a {describe(param)} on {param.device}"
        )
