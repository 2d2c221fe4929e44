"""The names that a U-Net's weights have in the original Stable Diffusion code, which other front ends read.

diffusers reads these names (``from_single_file``) and writes its own only.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Before every name in a checkpoint.
PREFIX = "model.diffusion_model."
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    # SDXL's pooled embedding and sizes.
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def ldm_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The original names of a U-Net's weights.

    Parameters
    ----------
    names : iterable of str
        Names of diffusers.
    config : mapping
        The U-Net's configuration, as diffusers has it.

    Returns
    -------
    dict of str to str
        Name of diffusers to the original one with its prefix.

    Raises
    ------
    ValueError
        If a weight is of a layer that the U-Nets of Stable Diffusion 1.x, 2.x and XL do not have, or blocks have
        different numbers of layers.
    """
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise ValueError(
            f"layers_per_block is {layers}, expected one number: the original code has no names for others"
        )
    attends = {match[2] for name in names if (match := _BLOCK.match(name)) and match[1] + match[3] == "upattentions"}
    return {name: PREFIX + _original(name, layers, attends) for name in names}


def _original(name: str, layers: int, attends: set[str]) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{leaf}"
    if match := _MIDDLE.fullmatch(name):
        kind, number, rest = match.groups()
        return f"middle_block.{2 * int(number) + (kind == 'attentions')}.{_inner(name, kind, rest)}"
    if match := _BLOCK.fullmatch(name):
        way, block, kind, number, rest = match.groups()
        first = int(block) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            # After the attention, if the block has one.
            return f"output_blocks.{first + layers}.{2 if block in attends else 1}.{rest}"
        place = f"input_blocks.{first + int(number) + 1}" if way == "down" else f"output_blocks.{first + int(number)}"
        return f"{place}.{int(kind == 'attentions')}.{_inner(name, kind, rest)}"
    raise ValueError(f"the weight {name} has no name in the original Stable Diffusion code")


def _inner(name: str, kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, leaf = rest.partition(".")
    if layer not in _RESNET:
        raise ValueError(f"the weight {name} has no name in the original Stable Diffusion code")
    return f"{_RESNET[layer]}.{leaf}"
