"""The gradients that a step takes in addition to ``.grad``: the parameter of each, and whether it fits."""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from ..flat import describe
from ..mask import match_names
from .slots import Slot

MaskedGrads = Mapping[str, Tensor] | Mapping[Tensor, Tensor] | Iterable[Tensor | None]


def align_masked_grads(
    masked_grads: MaskedGrads, slots: Sequence[Slot], names: Sequence[str] | None
) -> list[Tensor | None]:
    """One gradient or None for each parameter: from a mapping by name or by parameter, or in the parameters' order.

    ``names``: the names of all parameters, or None if any has no name.
    """
    if isinstance(masked_grads, Tensor):
        raise TypeError("masked_grads is one tensor, expected one gradient (or None) for each parameter")
    if not isinstance(masked_grads, Mapping):
        grads = masked_grads if isinstance(masked_grads, list) else list(masked_grads)
        if len(grads) != len(slots):
            raise ValueError(f"masked_grads has {len(grads)} entries, the optimizer {len(slots)} parameters")
        return grads
    if names is not None and len(masked_grads) == len(names) > 1:
        try:
            return list(itemgetter(*names)(masked_grads))
        except KeyError:
            pass
    keys = list(masked_grads)
    if all(isinstance(key, str) for key in keys):
        if names is None:
            raise ValueError("masked_grads has names, the optimizer has none: give it model.named_parameters()")
        positions = match_names(names, keys)
    else:
        index = {id(key): i for i, key in enumerate(keys)}
        positions = [index.get(id(slot.owner)) for slot in slots]
    unknown = set(range(len(keys))).difference(positions)
    if unknown:
        key = keys[min(unknown)]
        label = key if isinstance(key, str) else "a parameter"
        raise ValueError(f"masked_grads has a gradient for {label}, which this optimizer does not have")
    return [None if position is None else masked_grads[keys[position]] for position in positions]


def _has_dispatch(tensor: Tensor) -> bool:
    """Whether this is a tensor subclass that handles operators itself, so that it may have no memory of its own."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def fits(grad: Tensor, param: Tensor) -> bool:
    """Whether ``grad`` can be the gradient of ``param``."""
    return (
        isinstance(grad, Tensor)
        and grad.layout is torch.strided
        and (grad.shape, grad.dtype, grad.device) == (param.shape, param.dtype, param.device)
        and (not _has_dispatch(grad) or _has_dispatch(param))
    )


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
    if _has_dispatch(grad) and not _has_dispatch(param):
        raise TypeError(f"{what} of parameter {slot.label} is a {type(grad).__name__}, expected a plain tensor")
    if not fits(grad, param):
        raise ValueError(
            f"{what} of parameter {slot.label} is a {describe(grad)} on {grad.device}, "
            f"the parameter a {describe(param)} on {param.device}"
        )


def with_gradients(
    slots: Sequence[Slot], grads: Sequence[Tensor | None], masked_grads: Sequence[Tensor | None]
) -> list[Slot]:
    """The parameters that have a gradient of either kind. Raises if one does not fit its parameter."""
    for what, tensors in (("the gradient", grads), ("masked_grads", masked_grads)):
        for slot, grad in zip(slots, tensors, strict=False):
            if grad is not None:
                check_grad(what, grad, slot)
    return [
        s for s in slots if grads[s.position] is not None or (masked_grads and masked_grads[s.position] is not None)
    ]
