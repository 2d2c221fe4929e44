"""A ``UNet2DConditionModel`` from its configuration and its weights by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.text import check_text_conditional


def build_unet(config: dict[str, Any], state: Mapping[str, Tensor], path: str) -> nn.Module:
    """Build the ``UNet2DConditionModel`` of a configuration with these weights, in their dtype.

    Parameters
    ----------
    config : dict
        As diffusers has it.
    state : Mapping
        Weights by name.
    path : str
        Their file, for messages.

    Raises
    ------
    ValueError
        If the configuration cannot be built, or the weights do not fit every parameter.
    """
    from diffusers import UNet2DConditionModel

    # Data parallelism adds this prefix.
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a configuration that cannot be built: {error}") from error
    check_text_conditional(unet)
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{path} is of another architecture: {len(wrong)} names or shapes differ, such as {first}: "
            f"{actual.get(first)}, expected {expected.get(first)}"
        )
    dtypes = {value.dtype for value in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    unet.load_state_dict({name: value.to(dtype).contiguous() for name, value in state.items()}, assign=True)
    return unet.eval()
