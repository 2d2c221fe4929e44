"""Sharded tensors (DTensor, as FSDP2's ``fully_shard`` makes parameters): this process's part, and who has the rest.

Masks and optimizer work on the local parts. A selection runs over the processes that hold the others. Files hold whole
tensors, which any number of processes can go on from.
"""

import sys
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    # Not imported before somebody has made one: it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, sharing its memory; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` as this process's part of a tensor sharded as ``whole`` is; itself where that is not a DTensor."""
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All entries of a DTensor, put together from the processes' parts, each of which has to call this; any other
    tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        # gloo gathers no int16.
        if tensor.dtype == torch.int16:
            return like(tensor.to_local().int(), tensor).full_tensor().short()
        return tensor.detach().full_tensor()


def part_of(whole: Tensor, sharded: Tensor) -> Tensor:
    """This process's part of ``whole``, a tensor of the shape of ``sharded``, as that one is sharded; itself where that
    is no DTensor. Without communication: every process has all of it."""
    if not is_sharded(sharded):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # A copy, or the part would keep all of it.
    held = distribute_tensor(whole.detach(), sharded.device_mesh, sharded.placements, src_data_rank=None)
    return held.to_local().clone()


def shard_group(tensors: Iterable[Tensor], what: str = "scores") -> dist.ProcessGroup | None:
    """The processes that the tensors are sharded over; None where every process has all of them.

    Raises ValueError where that is not one group: tensors sharded along several dimensions of the mesh, over different
    meshes, or only some of them sharded; then entries could not be counted once each.
    """
    tensors = list(tensors)
    kinds = {_kind(tensor, what) for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(
            f"{what} are sharded in different ways ({len(kinds)}): expected all over one process group, or none"
        )
    found = next(iter(kinds), None)
    if found is None:
        return None
    mesh, dimension = found
    return mesh.get_group(dimension)


def _kind(tensor: Tensor, what: str) -> tuple | None:
    """The mesh and its dimension that a tensor is sharded along; None where it is not."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    split = [i for i, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    for i in split:
        # Exactly: strided shards, which FSDP makes of tensor-parallel parameters, are kinds of their own.
        if type(tensor.placements[i]) is not Shard:
            raise ValueError(f"{what} have a placement {tensor.placements[i]}, expected Shard or Replicate")
    if len(split) > 1:
        raise ValueError(f"{what} are sharded along {len(split)} dimensions of the mesh, expected one")
    return (tensor.device_mesh, split[0]) if split else None


def add_over(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sum of ``value`` over the processes that ``tensors`` are sharded over."""
    group = shard_group(tensors, "params")
    if group is not None:
        dist.all_reduce(value, group=group)
    return value
