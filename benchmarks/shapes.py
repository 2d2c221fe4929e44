"""Parameter shapes of the networks that the benchmarks run on, generated from the architectures' rules.

One list a size, used by every benchmark. The names are those of the published checkpoints, so that a list can be
compared with a real model's ``named_parameters()``; the order is that of the forward pass.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _conv(name: str, inputs: int, outputs: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _ddpm_resnet(name: str, inputs: int, outputs: int, embedding: int):
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs, 3)
    yield from _linear(f"{name}.temb_cemb_proj", embedding, outputs)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{name}.nin_shortcut", inputs, outputs, 1)


def _ddpm_attention(name: str, channels: int):
    yield from _norm(f"{name}.norm", channels)
    for projection in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.{projection}", channels, channels, 1)


def _ddpm(
    resolution: int, multipliers: Sequence[int], channels: int, classes: int = 10, blocks: int = 2, attention: int = 16
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Class-conditional DDPM U-Net (Ho et al., 2020, as Selective Amnesia and SalUn condition it).

    Time and class each go through an MLP to 4 * channels; every residual block projects their concatenation.
    """
    width = 4 * channels
    yield from _linear("temb.dense.0", channels, width)
    yield from _linear("temb.dense.1", width, width)
    yield "cemb.embedding.weight", (classes, channels)
    yield "cemb.null_embedding", (channels,)
    yield from _linear("cemb.dense.0", channels, width)
    yield from _linear("cemb.dense.1", width, width)
    yield from _conv("conv_in", 3, channels, 3)
    levels = len(multipliers)
    skips = [channels]
    current = channels
    for level, multiplier in enumerate(multipliers):
        outputs = channels * multiplier
        for block in range(blocks):
            yield from _ddpm_resnet(f"down.{level}.block.{block}", current, outputs, 2 * width)
            current = outputs
            if resolution >> level == attention:
                yield from _ddpm_attention(f"down.{level}.attn.{block}", current)
            skips.append(current)
        if level != levels - 1:
            yield from _conv(f"down.{level}.downsample.conv", current, current, 3)
            skips.append(current)
    yield from _ddpm_resnet("mid.block_1", current, current, 2 * width)
    yield from _ddpm_attention("mid.attn_1", current)
    yield from _ddpm_resnet("mid.block_2", current, current, 2 * width)
    for level in reversed(range(levels)):
        outputs = channels * multipliers[level]
        for block in range(blocks + 1):
            yield from _ddpm_resnet(f"up.{level}.block.{block}", current + skips.pop(), outputs, 2 * width)
            current = outputs
            if resolution >> level == attention:
                yield from _ddpm_attention(f"up.{level}.attn.{block}", current)
        if level != 0:
            yield from _conv(f"up.{level}.upsample.conv", current, current, 3)
    yield from _norm("norm_out", current)
    yield from _conv("conv_out", current, 3, 3)


def _sd_resnet(name: str, inputs: int, outputs: int, embedding: int):
    yield from _norm(f"{name}.norm1", inputs)
    yield from _conv(f"{name}.conv1", inputs, outputs, 3)
    yield from _linear(f"{name}.time_emb_proj", embedding, outputs)
    yield from _norm(f"{name}.norm2", outputs)
    yield from _conv(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _conv(f"{name}.conv_shortcut", inputs, outputs, 1)


def _sd_attention(name: str, channels: int, context: int):
    yield from _linear(f"{name}.to_q", channels, channels, bias=False)
    yield from _linear(f"{name}.to_k", context, channels, bias=False)
    yield from _linear(f"{name}.to_v", context, channels, bias=False)
    yield from _linear(f"{name}.to_out.0", channels, channels)


def _sd_transformer(name: str, channels: int, depth: int, context: int, linear_projection: bool):
    project = _linear if linear_projection else lambda n, i, o: _conv(n, i, o, 1)
    yield from _norm(f"{name}.norm", channels)
    yield from project(f"{name}.proj_in", channels, channels)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        yield from _norm(f"{block}.norm1", channels)
        yield from _sd_attention(f"{block}.attn1", channels, channels)
        yield from _norm(f"{block}.norm2", channels)
        yield from _sd_attention(f"{block}.attn2", channels, context)
        yield from _norm(f"{block}.norm3", channels)
        # GEGLU: value and gate in one projection.
        yield from _linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        yield from _linear(f"{block}.ff.net.2", 4 * channels, channels)
    yield from project(f"{name}.proj_out", channels, channels)


def _stable_diffusion(
    channels: Sequence[int],
    depths: Sequence[int],
    context: int,
    linear_projection: bool,
    added: int | None = None,
    blocks: int = 2,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Text-conditional latent U-Net (Rombach et al., 2022; Podell et al., 2023).

    ``depths``: transformer blocks at each level, 0 for a level without attention. ``added``: width of SDXL's pooled
    text and size conditioning.
    """
    width = 4 * channels[0]
    yield from _conv("conv_in", 4, channels[0], 3)
    yield from _linear("time_embedding.linear_1", channels[0], width)
    yield from _linear("time_embedding.linear_2", width, width)
    if added is not None:
        yield from _linear("add_embedding.linear_1", added, width)
        yield from _linear("add_embedding.linear_2", width, width)
    levels = len(channels)
    skips = [channels[0]]
    current = channels[0]
    for level, outputs in enumerate(channels):
        name = f"down_blocks.{level}"
        for block in range(blocks if depths[level] else 0):
            yield from _sd_transformer(f"{name}.attentions.{block}", outputs, depths[level], context, linear_projection)
        for block in range(blocks):
            yield from _sd_resnet(f"{name}.resnets.{block}", current, outputs, width)
            current = outputs
            skips.append(current)
        if level != levels - 1:
            yield from _conv(f"{name}.downsamplers.0.conv", current, current, 3)
            skips.append(current)
    depth = max(depths[-1], 1)
    yield from _sd_transformer("mid_block.attentions.0", current, depth, context, linear_projection)
    for block in range(2):
        yield from _sd_resnet(f"mid_block.resnets.{block}", current, current, width)
    for i, level in enumerate(reversed(range(levels))):
        name = f"up_blocks.{i}"
        outputs = channels[level]
        for block in range(blocks + 1 if depths[level] else 0):
            yield from _sd_transformer(f"{name}.attentions.{block}", outputs, depths[level], context, linear_projection)
        for block in range(blocks + 1):
            yield from _sd_resnet(f"{name}.resnets.{block}", current + skips.pop(), outputs, width)
            current = outputs
        if level != 0:
            yield from _conv(f"{name}.upsamplers.0.conv", current, current, 3)
    yield from _norm("conv_norm_out", current)
    yield from _conv("conv_out", current, 4, 3)


_SIZES = {
    "tiny": lambda: _ddpm(16, (1, 2), channels=8),
    "small": lambda: _ddpm(32, (1, 2, 2, 2), channels=32),
    "cifar10": lambda: _ddpm(32, (1, 2, 2, 2), channels=128),
    "stl10": lambda: _ddpm(64, (1, 2, 2, 2, 4), channels=128),
    "sd15": lambda: _stable_diffusion((320, 640, 1280, 1280), (1, 1, 1, 0), context=768, linear_projection=False),
    "sdxl": lambda: _stable_diffusion((320, 640, 1280), (0, 2, 10), context=2048, linear_projection=True, added=2816),
}
SIZES = tuple(_SIZES)

# Numbers of parameters of the published models.
PUBLISHED_TOTALS = {"cifar10": 38_632_323, "stl10": 83_159_683, "sd15": 859_520_964, "sdxl": 2_567_463_684}


@cache
def _cached(size: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(_SIZES[size]())


def shapes(size: str) -> Shapes:
    """Name and shape of every parameter of the network called ``size`` (one of ``SIZES``), in order."""
    if size not in _SIZES:
        raise ValueError(f"size is {size!r}, expected one of {', '.join(SIZES)}")
    return dict(_cached(size))


def numel(size: str) -> int:
    """Number of parameters of the network called ``size``."""
    return sum(math.prod(shape) for shape in shapes(size).values())
