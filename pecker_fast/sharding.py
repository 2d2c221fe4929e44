"""Sharded tensors (DTensor, as created by FSDP2's ``fully_shard``): the local shard and the group that holds the rest.

Masks and optimizers work on local shards. A selection runs over the process group that holds the others. Files contain
whole tensors, so a run can be resumed on any number of processes.
"""

import sys
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    # Imported lazily: the import takes a second, and without it no DTensor can exist.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, sharing its memory; any other tensor unchanged."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(part: Tensor, whole: Tensor) -> Tensor:
    """Wraps ``part`` as the local shard of a tensor sharded like ``whole``; unchanged if that is not a DTensor."""
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """Gathers a DTensor from its shards, which every process of the group has to call; any other tensor unchanged."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        # gloo cannot gather int16.
        if tensor.dtype == torch.int16:
            return like(tensor.to_local().int(), tensor).full_tensor().short()
        return tensor.detach().full_tensor()


def part_of(whole: Tensor, sharded: Tensor) -> Tensor:
    """The local shard of ``whole``, sharded like ``sharded``; unchanged if that is not a DTensor.

    Needs no communication, because every process has all of ``whole``.
    """
    if not is_sharded(sharded):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Cloned, because a view would keep the whole tensor alive.
    shard = distribute_tensor(whole.detach(), sharded.device_mesh, sharded.placements, src_data_rank=None)
    return shard.to_local().clone()


def shard_group(tensors: Iterable[Tensor], what: str = "scores") -> dist.ProcessGroup | None:
    """The process group that the tensors are sharded over; None if every process has all of them.

    Raises
    ------
    ValueError
        If it is not a single group: tensors are sharded along several mesh dimensions, over different meshes, or only
        some are sharded. Entries could then not be counted exactly once.
    """
    tensors = list(tensors)
    kinds = {_kind(tensor, what) for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(
            f"{what} are sharded in different ways ({len(kinds)}): expected all over one process group, or none"
        )
    kind = next(iter(kinds), None)
    if kind is None:
        return None
    mesh, dimension = kind
    return mesh.get_group(dimension)


def _kind(tensor: Tensor, what: str) -> tuple | None:
    """The mesh and the mesh dimension that a tensor is sharded along; None if it is not sharded."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    dimensions = [i for i, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    for i in dimensions:
        # The exact type: strided shards, which FSDP makes of tensor-parallel parameters, are subclasses.
        if type(tensor.placements[i]) is not Shard:
            raise ValueError(f"{what} have a placement {tensor.placements[i]}, expected Shard or Replicate")
    if len(dimensions) > 1:
        raise ValueError(f"{what} are sharded along {len(dimensions)} dimensions of the mesh, expected one")
    return (tensor.device_mesh, dimensions[0]) if dimensions else None


def add_over(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sums ``value``, in place, over the process group that ``tensors`` are sharded over."""
    group = shard_group(tensors, "params")
    if group is not None:
        dist.all_reduce(value, group=group)
    return value
