"""Networks whose weights the processes of a run share (FSDP2), and their states with whole tensors.

Networks that are not sharded have the same states: a run resumes from a checkpoint on any number of processes, sharded
or not. Gathering whole tensors takes all processes; only the main one receives them, on the CPU.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import TextConditioned
from ..mask import SaliencyMask
from ..optim import MaskedAdam
from ..parallel import World
from ..sharding import is_sharded, like, local, part_of, whole

# Entries of an optimizer's state that are words of a mask.
_WORDS = ("mask_words", "touched_words")


def shard(network: nn.Module, world: World, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Share the weights of a U-Net among the processes, in place: each block is gathered while it computes.

    Parameters
    ----------
    network : nn.Module
        A U-Net of diffusers, or a ``TextConditioned`` one.
    world : World
        The processes.
    device : torch.device
        The network's device.
    dtype : torch.dtype, optional
        Dtype in which blocks compute; the weights' own by default.

    Returns
    -------
    nn.Module
        The network. Its gradients become the mean over the processes, in float32.

    Raises
    ------
    ValueError
        If the network has no blocks of a U-Net.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FSDP2 takes no other format.
    network.to(memory_format=torch.contiguous_format)
    mesh = DeviceMesh.from_group(world.group, device.type)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in sharded_blocks(network):
        # Resharding the root too: otherwise a network that is called twice before its backward passes loses the
        # gradients of the weights outside the blocks.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        if device.type == "cpu":
            # gloo of torch 2.8 returns the sum of gradients when FSDP requests their mean.
            sharded.set_force_sum_reduction_for_comms(True)
    return network


def sharded_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time.

    Returns
    -------
    list of nn.Module
        The blocks of the U-Net, and last the U-Net itself for the weights outside the blocks.

    Raises
    ------
    ValueError
        If the network has no blocks of a U-Net.
    """
    unet = network.unet if isinstance(network, TextConditioned) else network
    if not hasattr(unet, "down_blocks"):
        raise ValueError(f"fsdp is set, but a {type(unet).__name__} has no down_blocks: expected a U-Net of diffusers")
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet]


def _gathered(tensor: Tensor, world: World) -> Tensor:
    """A sharded tensor whole, on the CPU of the main process and empty on the others; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    gathered = whole(tensor)
    return gathered.cpu() if world.is_main else gathered.new_empty(0)


def network_state(network: nn.Module, world: World) -> dict[str, Tensor]:
    """The network's state dict, whole on the main process."""
    return {name: _gathered(value, world) for name, value in network.state_dict().items()}


@torch.no_grad()
def load_network_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state, which every process has. ValueError if the state is another network's."""
    own_state = network.state_dict()
    if not any(map(is_sharded, own_state.values())):
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the state is of another network: {error}") from error
        return
    shapes = [{name: value.shape for name, value in values.items()} for values in (own_state, state)]
    if shapes[0] != shapes[1]:
        different = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(f"the state is of another network: {different[0]} differs")
    for name, value in own_state.items():
        local(value).copy_(part_of(state[name].to(value.device), value))


@torch.no_grad()
def whole_copy(network: nn.Module, of: nn.Module) -> nn.Module:
    """Copy a sharded network into one that is not sharded; ``of`` is a network of its architecture."""
    state = network.state_dict()
    result = copy.deepcopy(of).to(next(iter(state.values())).dtype)
    for name, target in result.state_dict().items():
        target.copy_(whole(state[name]))
    return result


def _entries(optimizer: MaskedAdam, state: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """The optimizer's parameters, each with its entry of ``state``."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [i for group in state["param_groups"] for i in group["params"]]
    return [(p, state["state"][i]) for p, i in zip(params, ids, strict=True) if i in state["state"]]


def optimizer_state(optimizer: MaskedAdam, world: World) -> dict[str, Any]:
    """The optimizer's state dict, whole on the main process. State of sharded parameters must not be packed."""
    state = optimizer.state_dict()
    for param, entry in _entries(optimizer, state):
        if is_sharded(param):
            for name in _WORDS:
                if name in entry:
                    words = SaliencyMask(entry[name], [local(param).shape]).whole([param]).words
                    entry[name] = words.cpu() if world.is_main else words.new_empty(0)
            entry.update({name: _gathered(value, world) for name, value in entry.items() if isinstance(value, Tensor)})
    return state


def load_optimizer_state(optimizer: MaskedAdam, state: dict[str, Any]) -> None:
    """Load a whole state, which every process has. ValueError if it does not fit the parameters."""
    parts = {**state, "state": {i: dict(entry) for i, entry in state["state"].items()}}
    for param, entry in _entries(optimizer, parts):
        if not is_sharded(param):
            continue
        for name, value in entry.items():
            if name in _WORDS:
                entry[name] = SaliencyMask(value.to(param.device), [param.shape]).part([param]).words
            elif isinstance(value, Tensor) and value.ndim and value.shape == param.shape:
                entry[name] = like(part_of(value.to(param.device), param), param)
    optimizer.load_state_dict(parts)
