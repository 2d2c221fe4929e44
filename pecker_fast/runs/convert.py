"""``pecker-fast convert``: a pickled U-Net, such as SiD-LSG's checkpoints, as a folder of safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.text import check_text_conditional
from ..files import write_folder
from ..models import resolve_config
from ..models.pickled import Stub, config_of, read_pickle, state_of


def convert(input: str, output: str, like: str | None = None, key: str | None = None) -> None:
    """Reads a pickled U-Net of Stable Diffusion (SiD-LSG's .pkl) without running code in it, and writes it as diffusers
    does: config.json and safetensors, for --initial_generator.

    Args:
        input: The pickle, or a file of torch.save.
        output: Folder to write.
        like: Folder of a Stable Diffusion or of its U-Net whose configuration it has; what the pickle says by default.
        key: Which entry of the file; ema, G_ema, generator, model or state_dict by default, the first that is there.
    """
    if Path(output).exists():
        raise ValueError(f"output is {output!r}, which is there already")
    found = _choose(read_pickle(input), key, input)
    try:
        state = state_of(found)
    except ValueError as error:
        raise ValueError(f"{input} has no module and no weights where they are looked for: {error}") from error
    unet = build(_config(found, like, input), state, input)
    write_folder(output, lambda folder: unet.save_pretrained(folder, safe_serialization=True))
    print(f"{sum(p.numel() for p in unet.parameters()):,d} parameters, {unet.dtype}: {output}")


def _choose(found: Any, key: str | None, path: str) -> Any:
    if isinstance(found, Stub) or not isinstance(found, Mapping):
        if key is not None:
            raise ValueError(f"key is {key!r}, but {path} has no entries: it is one {type(found).__name__}")
        return found
    if key is not None:
        if key not in found:
            raise ValueError(f"key is {key!r}, but {path} has {', '.join(map(str, list(found)[:8]))}")
        return found[key]
    names = [name for name in ("ema", "G_ema", "generator", "model", "state_dict") if name in found]
    return found[names[0]] if names else found


def _config(found: Any, like: str | None, path: str) -> dict[str, Any]:
    if like is None:
        config = config_of(found)
        if config is None:
            raise ValueError(f"{path} does not say its configuration: give --like, a model of the same architecture")
        return config
    return resolve_config(like, name="like")


def build(config: dict[str, Any], state: Mapping[str, Tensor], path: str) -> nn.Module:
    """The ``UNet2DConditionModel`` of a configuration with these weights, in their dtype. ValueError where they do not
    fit in every parameter."""
    from diffusers import UNet2DConditionModel

    # What data parallelism puts in front.
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a configuration that cannot be built: {error}") from error
    check_text_conditional(unet)
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    wrong = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{path} is of another architecture: {len(wrong)} names or shapes differ, such as {first}: "
            f"{given.get(first)} there, expected {expected.get(first)}"
        )
    dtypes = {value.dtype for value in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    unet.load_state_dict({name: value.to(dtype).contiguous() for name, value in state.items()}, assign=True)
    return unet.eval()
