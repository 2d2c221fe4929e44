"""A pickled U-Net, such as SiD-LSG's checkpoints, as a folder of safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_folder
from ..models import resolve_config
from ..models.pickled import Stub, config_of, read_pickle, state_of
from ..models.unet_files import build_unet


def convert(input: str, output: str, like: str | None = None, key: str | None = None) -> str:
    """Read a pickled U-Net of Stable Diffusion (SiD-LSG's .pkl) without running code in it, and write it in diffusers'
    layout: config.json and safetensors, for --initial_generator.

    Parameters
    ----------
    input : str
        The pickle, or a file of torch.save.
    output : str
        Folder to write.
    like : str, optional
        Folder of a Stable Diffusion or of its U-Net that has the same configuration. Default: what the pickle says.
    key : str, optional
        Entry of the file to read. Default: the first of ema, G_ema, generator, model and state_dict.

    Returns
    -------
    str
        What was written, in a line to read.

    Raises
    ------
    ValueError
        If the folder exists, or the file holds no such U-Net.
    """
    if Path(output).exists():
        raise ValueError(f"output is {output!r}, which exists already")
    content = _choose(read_pickle(input), key, input)
    try:
        state = state_of(content)
    except ValueError as error:
        raise ValueError(f"{input} has neither a module nor weights where they are expected: {error}") from error
    unet = build_unet(_config(content, like, input), state, input)
    write_folder(output, lambda folder: unet.save_pretrained(folder, safe_serialization=True))
    return f"{sum(p.numel() for p in unet.parameters()):,d} parameters, {unet.dtype}: {output}"


def _choose(content: Any, key: str | None, path: str) -> Any:
    if isinstance(content, Stub) or not isinstance(content, Mapping):
        if key is not None:
            raise ValueError(f"key is {key!r}, but {path} has no entries: it is one {type(content).__name__}")
        return content
    if key is not None:
        if key not in content:
            raise ValueError(f"key is {key!r}, but {path} has {', '.join(map(str, list(content)[:8]))}")
        return content[key]
    names = [name for name in ("ema", "G_ema", "generator", "model", "state_dict") if name in content]
    return content[names[0]] if names else content


def _config(content: Any, like: str | None, path: str) -> dict[str, Any]:
    if like is None:
        config = config_of(content)
        if config is None:
            raise ValueError(f"{path} does not say its configuration: give --like, a model of the same architecture")
        return config
    return resolve_config(like, name="like")
