"""What saliency_mask is compared with: the same masks as a good engineer would make them in plain torch or numpy.

Each takes the list of gradients and returns one bool tensor (SalUn: int64) for each. They concatenate the gradients
once and select in place where their library lets them.
"""

import torch
from torch import Tensor


def flat_magnitudes(grads: list[Tensor]) -> Tensor:
    return torch.cat([grad.reshape(-1) for grad in grads]).abs_()


def keep(density: float, numel: int) -> int:
    return max(1, int(density * numel))


def masks_from_threshold(grads: list[Tensor], threshold: Tensor) -> list[Tensor]:
    return [grad.abs() >= threshold for grad in grads]


def numpy_partition(grads: list[Tensor], density: float) -> list[Tensor]:
    flat = flat_magnitudes(grads).float().numpy()
    position = flat.size - keep(density, flat.size)
    flat.partition(position)
    return masks_from_threshold(grads, torch.tensor(flat[position]))


def torch_kthvalue(grads: list[Tensor], density: float) -> list[Tensor]:
    flat = flat_magnitudes(grads)
    k = keep(density, flat.numel())
    return masks_from_threshold(grads, torch.kthvalue(flat, flat.numel() - k + 1).values)


def torch_topk(grads: list[Tensor], density: float) -> list[Tensor]:
    flat = flat_magnitudes(grads)
    indices = torch.topk(flat, keep(density, flat.numel()), sorted=False).indices
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[indices] = True
    pieces = mask.split([grad.numel() for grad in grads])
    return [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)]


def torch_sort(grads: list[Tensor], density: float) -> list[Tensor]:
    flat = flat_magnitudes(grads)
    k = keep(density, flat.numel())
    return masks_from_threshold(grads, torch.sort(flat).values[flat.numel() - k])


def argsort_of_argsort(grads: list[Tensor], density: float) -> list[Tensor]:
    """SalUn's way: rank of every entry by sorting twice, masks as int64 ones and zeros."""
    flat = flat_magnitudes(grads).neg_()
    ranks = torch.argsort(torch.argsort(flat))
    mask = (ranks < keep(density, flat.numel())).long()
    pieces = mask.split([grad.numel() for grad in grads])
    return [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)]


RIVALS = {
    "numpy.partition": numpy_partition,
    "torch.kthvalue": torch_kthvalue,
    "torch.topk": torch_topk,
    "torch.sort": torch_sort,
    "argsort of argsort": argsort_of_argsort,
}
CPU_ONLY = {"numpy.partition"}
