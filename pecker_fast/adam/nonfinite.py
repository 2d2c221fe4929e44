"""The number of entries of a step's gradients that are inf or NaN."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .binding import Binding
from .slots import Slot


def count_nonfinite(
    slots: list[Slot],
    grads: Sequence[Tensor | None],
    masked_grads: Sequence[Tensor | None] | None,
    binding: Binding | None,
    grad_scale: Tensor | None,
    backend: str | None,
) -> Tensor:
    """The count over all ``slots``, int64 [] on the first one's device, without waiting for it.

    grads, masked_grads: by the parameters' positions; where there is a mask (``binding``), gradients of a masked step
    and ``masked_grads`` count within it. grad_scale: the divisor that gradients still need, or None.
    """
    total = None
    by_kind: dict[tuple, list[Slot]] = {}
    for slot in slots:
        by_kind.setdefault((slot.param.device, slot.param.dtype), []).append(slot)
    for (device, _), same in by_kind.items():
        flat = lambda tensors, same=same: [  # noqa: E731
            None if tensors[s.position] is None else s.flat(tensors[s.position]) for s in same
        ]
        count = ops.count_nonfinite(
            flat(grads),
            [] if masked_grads is None else flat(masked_grads),
            None if binding is None else binding.words,
            [] if binding is None else [binding.offsets[s.position] for s in same],
            None if grad_scale is None else grad_scale.to(device, torch.float32),
            backend=backend,
        )
        total = count if total is None else total + count.to(total.device)
    return total
