"""Networks whose weights the processes of a run share out (FSDP2), and states of them with whole tensors.

Networks that are not shared out have the same states: a run goes on from a checkpoint on any number of processes,
sharded or not. Every process has to call what puts tensors together; the main one gets them, on the CPU.
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
    """Shares out the weights of a U-Net over the processes, in place: each block is put together while it computes.

    ``dtype``: what blocks compute in, where that is not the weights' own. Gradients become the processes' mean, in
    float32. ValueError for a network without a U-Net's blocks.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # FSDP2 takes no others.
    network.to(memory_format=torch.contiguous_format)
    mesh = DeviceMesh.from_group(world.group, device.type)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in sharded_blocks(network):
        # The root too: a network that is called twice before its backward passes would lose the gradients of the rest.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        if device.type == "cpu":
            # gloo of torch 2.8 adds up gradients where it is asked for their mean.
            sharded.set_force_sum_reduction_for_comms(True)
    return network


def sharded_blocks(network: nn.Module) -> list[nn.Module]:
    """What is put together at a time: the blocks of a U-Net, and last the U-Net for what is in no block. ValueError for
    a network that has none."""
    unet = network.unet if isinstance(network, TextConditioned) else network
    if not hasattr(unet, "down_blocks"):
        raise ValueError(f"fsdp is set, but a {type(unet).__name__} has no down_blocks: expected a U-Net of diffusers")
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet]


def _kept(tensor: Tensor, world: World) -> Tensor:
    """A sharded tensor whole, on the CPU of the main process and empty on the others; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    found = whole(tensor)
    return found.cpu() if world.is_main else found.new_empty(0)


def network_state(network: nn.Module, world: World) -> dict[str, Tensor]:
    """The network's state dict, whole on the main process."""
    return {name: _kept(value, world) for name, value in network.state_dict().items()}


@torch.no_grad()
def load_network_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a whole state, which every process has. ValueError where it is another network's."""
    held = network.state_dict()
    if not any(map(is_sharded, held.values())):
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the state is of another network: {error}") from error
        return
    shapes = [{name: value.shape for name, value in values.items()} for values in (held, state)]
    if shapes[0] != shapes[1]:
        wrong = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(f"the state is of another network: {wrong[0]} differs")
    for name, value in held.items():
        local(value).copy_(part_of(state[name].to(value.device), value))


@torch.no_grad()
def whole_copy(network: nn.Module, of: nn.Module) -> nn.Module:
    """A network that is not shared out, with the weights of one that is; ``of``: one of its architecture."""
    state = network.state_dict()
    made = copy.deepcopy(of).to(next(iter(state.values())).dtype)
    for name, target in made.state_dict().items():
        target.copy_(whole(state[name]))
    return made


def _entries(optimizer: MaskedAdam, state: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Parameters and what ``state`` has of them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [i for group in state["param_groups"] for i in group["params"]]
    return [(p, state["state"][i]) for p, i in zip(params, ids, strict=True) if i in state["state"]]


def optimizer_state(optimizer: MaskedAdam, world: World) -> dict[str, Any]:
    """The optimizer's state dict, whole on the main process. Its state is not packed where parameters are sharded."""
    state = optimizer.state_dict()
    for param, entry in _entries(optimizer, state):
        if is_sharded(param):
            for name in _WORDS:
                if name in entry:
                    words = SaliencyMask(entry[name], [local(param).shape]).whole([param]).words
                    entry[name] = words.cpu() if world.is_main else words.new_empty(0)
            entry.update({name: _kept(value, world) for name, value in entry.items() if isinstance(value, Tensor)})
    return state


def load_optimizer_state(optimizer: MaskedAdam, state: dict[str, Any]) -> None:
    """Loads a whole state, which every process has. ValueError where it does not fit the parameters."""
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
