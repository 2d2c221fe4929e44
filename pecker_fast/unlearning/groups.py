"""Masks of whole rows or whole tensors: what is not salient then needs no gradient at all."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..mask import SaliencyMask


def group_scores(grads: Mapping[str, Tensor], granularity: str) -> list[Tensor]:
    """Root mean square of the gradient in each group of each tensor, float32 (groups,).

    "row": a group is an index of a tensor's first dimension (an output channel, one number of a bias); "tensor": all of
    a tensor.
    """
    scores = []
    for grad in grads.values():
        count = len(grad) if granularity == "row" and grad.ndim else 1
        rows = grad.reshape(count, grad.numel() // max(1, count))
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        scores.append(norms / max(1, rows.shape[1]) ** 0.5)
    return scores


def fitting(sizes: Tensor, budget: int) -> Tensor:
    """Which of the groups are taken when, in their order, each that still fits into ``budget`` entries is.

    ``sizes``: int64 (groups,), at least 1, on the CPU. Returns bool (groups,).
    """
    taken = torch.zeros(len(sizes), dtype=torch.bool)
    left = torch.arange(len(sizes))
    while len(left := left[sizes[left] <= budget]):
        filled = sizes[left].cumsum(0)
        count = int((filled <= budget).sum())
        taken[left[:count]] = True
        budget -= int(filled[count - 1])
        # The one after them was too large.
        left = left[count + 1 :]
    return taken


def group_mask(
    grads: Mapping[str, Tensor], granularity: str, *, density: float | None = None, threshold: float | None = None
) -> tuple[SaliencyMask, list[bool]]:
    """The mask whose entries are those of the salient groups, and for each tensor whether it has any.

    Groups are taken in the order of their scores (``group_scores``), the largest first and the first of equal ones,
    each if it still fits into k = max(1, int(density * entries)) entries; or all whose score is at least
    ``threshold``. Scores of zero or NaN are never salient. Waits for the device.

    Arguments: ``grads`` the gradients by name; exactly one of ``density`` and ``threshold``.
    """
    parts = group_scores(grads, granularity)
    counts = [len(part) for part in parts]
    scores = torch.cat(parts).cpu()
    sizes = torch.cat([torch.full((n,), g.numel() // max(1, n)) for n, g in zip(counts, grads.values(), strict=True)])
    able = (scores > 0) & (sizes > 0)
    if density is not None:
        order = torch.where(able, scores, -1.0).argsort(descending=True, stable=True)[: int(able.sum())]
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[order[fitting(sizes[order], max(1, int(density * int(sizes.sum()))))]] = True
    else:
        kept = able & (scores >= threshold)
    pieces = kept.split(counts)
    bools = {
        name: piece.to(grad.device).view(-1, *[1] * (grad.ndim - 1)).expand(grad.shape) if grad.ndim else piece[0]
        for (name, grad), piece in zip(grads.items(), pieces, strict=True)
    }
    return SaliencyMask.from_bool(bools), [bool(piece.any()) for piece in pieces]
