"""Checkpoints of the class-conditional DDPM code that SFD, SalUn and Selective Amnesia share, as a U-Net of diffusers.

That network concatenates the embeddings of time and class, whereas ``UNet2DModel`` adds them. With an embedding twice
as wide the conversion is exact: the time MLP fills the first half, a table of the class MLP's outputs the second half,
and zeros the rest. Training continues with a slightly larger network: the class MLP has become a table with a row for
each class and one for "no condition", and the zeros are parameters too.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..archives import load_plain
from ..checks import check_choice, check_int
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.unet import register_classes

if TYPE_CHECKING:
    from diffusers import UNet2DModel

# Their networks have self-attention at this height only, which determines the image size.
ATTENTION_RESOLUTION = 16
DROPOUT = 0.1
States = Literal["auto", "ema", "model", "score"]

_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "temb_cemb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Parameters that are converted instead of copied.
_EMBEDDINGS = re.compile(r"(temb|cemb)\.dense\.[01]\.(weight|bias)|classes_emb\.weight|null_classes_emb")


def _read(path: Path) -> Any:
    """Read the file without running any code in it."""
    try:
        return load_plain(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error


def _choose(checkpoint: Any, path: Path, state: States) -> Mapping[str, Any]:
    """Return the weights that ``state`` names.

    A checkpoint is [model, optimizer, step] or [model, optimizer, step, EMA] (pretraining, SalUn, Selective Amnesia),
    [psi, its optimizer, theta, its optimizer, step], optionally with theta's EMA (SFD), or one network's weights.
    """
    if isinstance(checkpoint, Mapping):
        if state != "auto":
            raise ValueError(f"{path} has the weights of one network: checkpoint_state is {state!r}, expected auto")
        return checkpoint
    is_list = isinstance(checkpoint, (list, tuple))
    if not is_list or not 3 <= len(checkpoint) <= 6:
        kind = f"{type(checkpoint).__name__}{f' of {len(checkpoint)}' if is_list else ''}"
        raise ValueError(f"{path} has a {kind}, expected a checkpoint of SFD, SalUn or Selective Amnesia")
    is_sfd = len(checkpoint) >= 5
    places = {"model": 2 if is_sfd else 0}
    if is_sfd:
        places["score"] = 0
    if len(checkpoint) in (4, 6):
        places["ema"] = len(checkpoint) - 1
    states = {name: checkpoint[place] for name, place in places.items() if isinstance(checkpoint[place], Mapping)}
    name = next((name for name in ("ema", "model") if name in states), "") if state == "auto" else state
    if name not in states:
        raise ValueError(
            f"{path} has no weights {name or 'at all'} (checkpoint_state), expected {', '.join(states) or 'some'}"
        )
    return states[name]


def _weights(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """float32 weights by name, without DataParallel's prefix."""
    weights = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} has {name!r}, which is not a tensor, expected the weights of one network")
        short = name.removeprefix("module.")
        if short in weights:
            raise ValueError(f"{path} has {short} twice, with and without the prefix module.")
        weights[short] = value.detach().float()
    return weights


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """Count the different numbers that follow ``pattern`` in the names."""
    return len({match[1] for match in map(re.compile(pattern + r"\.(\d+)\.").match, weights) if match})


def _get(weights: Mapping[str, Tensor], name: str, ndim: int, path: Path) -> Tensor:
    if name not in weights or weights[name].ndim != ndim:
        raise ValueError(f"{path} has another architecture: it has no {name} of {ndim} dimensions")
    return weights[name]


def _config(weights: Mapping[str, Tensor], sample_size: int | None, path: Path) -> dict[str, Any]:
    """Derive the configuration of ``UNet2DModel`` from names and shapes."""
    channels = _get(weights, "conv_in.weight", 4, path).shape[1]
    levels, blocks = _count(weights, "down"), _count(weights, r"down\.0\.block")
    if not levels or not blocks:
        raise ValueError(f"{path} has another architecture: it has no down.0.block")
    outs = tuple(_get(weights, f"down.{i}.block.0.conv1.weight", 4, path).shape[0] for i in range(levels))
    attention = [_count(weights, rf"down\.{i}\.attn") > 0 for i in range(levels)]
    if sample_size is None:
        if sum(attention) != 1:
            raise ValueError(
                f"{path} has attention in {sum(attention)} levels, which does not determine the image size: "
                "give sample_size"
            )
        sample_size = ATTENTION_RESOLUTION * 2 ** attention.index(True)
    return {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": _get(weights, "conv_out.weight", 4, path).shape[0],
        "block_out_channels": outs,
        "layers_per_block": blocks,
        "down_block_types": tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        "up_block_types": tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        "time_embedding_dim": 2 * _get(weights, "temb.dense.1.weight", 2, path).shape[0],
        "num_class_embeds": _get(weights, "classes_emb.weight", 2, path).shape[0] + 1,
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "dropout": DROPOUT,
    }


def _renamed(name: str, levels: int) -> str | None:
    """Return diffusers' name of a parameter, or None if it has none."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in ("conv_in", "conv_out"):
        return name
    if stem == "norm_out":
        return f"conv_norm_out.{kind}"
    middle = re.fullmatch(r"mid\.(block_1|attn_1|block_2)\.(\w+)", stem)
    if middle:
        part, layer = middle[1], (_ATTENTION if middle[1] == "attn_1" else _RESNET).get(middle[2])
        place = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}[part]
        return None if layer is None else f"mid_block.{place}.{layer}.{kind}"
    sampled = re.fullmatch(r"(down|up)\.(\d+)\.(?:downsample|upsample)\.conv", stem)
    inner = re.fullmatch(r"(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)", stem)
    way = sampled or inner
    if not way:
        return None
    # The checkpoint counts levels from the finest one, diffusers in the order of computation.
    level = int(way[2]) if way[1] == "down" else levels - 1 - int(way[2])
    if sampled:
        return f"{way[1]}_blocks.{level}.{way[1]}samplers.0.conv.{kind}"
    layer = (_ATTENTION if inner[3] == "attn" else _RESNET).get(inner[5])
    part = "attentions" if inner[3] == "attn" else "resnets"
    return None if layer is None else f"{way[1]}_blocks.{level}.{part}.{inner[4]}.{layer}.{kind}"


def _embeddings(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert the embeddings: the time MLP in the first half, a table of the class MLP's outputs in the second half."""
    width = _get(weights, "conv_in.weight", 4, path).shape[0]
    size = _get(weights, "temb.dense.1.weight", 2, path).shape[0]

    def get(name: str, *shape: int) -> Tensor:
        value = _get(weights, name, len(shape), path)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{path} has another architecture: {name} has shape {tuple(value.shape)}, expected {shape}"
            )
        return value

    def dense(name: str, inputs: int) -> tuple[Tensor, Tensor]:
        return get(f"{name}.weight", size, inputs), get(f"{name}.bias", size)

    (time_in, time_in_bias), (time_out, time_out_bias) = dense("temb.dense.0", width), dense("temb.dense.1", size)
    (class_in, class_in_bias), (class_out, class_out_bias) = dense("cemb.dense.0", width), dense("cemb.dense.1", size)
    classes = _get(weights, "classes_emb.weight", 2, path).shape[0]
    rows = torch.cat([get("classes_emb.weight", classes, width), get("null_classes_emb", width)[None]]).double()
    hidden = torch.nn.functional.silu(rows @ class_in.double().T + class_in_bias.double())
    table = (hidden @ class_out.double().T + class_out_bias.double()).float()
    return {
        "time_embedding.linear_1.weight": torch.cat([time_in, torch.zeros_like(time_in)]),
        "time_embedding.linear_1.bias": torch.cat([time_in_bias, torch.zeros_like(time_in_bias)]),
        "time_embedding.linear_2.weight": torch.block_diag(time_out, torch.zeros_like(time_out)),
        "time_embedding.linear_2.bias": torch.cat([time_out_bias, torch.zeros_like(time_out_bias)]),
        "class_embedding.weight": torch.cat([torch.zeros_like(table), table], dim=1),
    }


def load_ancestor(
    path: str | os.PathLike, state: States = "auto", sample_size: int | None = None
) -> tuple["UNet2DModel", NoiseSchedule]:
    """Load a checkpoint of the public DDPM code of SFD, SalUn or Selective Amnesia.

    No code in the file is run. The output equals the original network's up to rounding, with and without a condition.
    The label after the last class is the null label.

    Parameters
    ----------
    path : str or os.PathLike
        The file.
    state : {"auto", "ema", "model", "score"}
        Which weights to load: "ema" (averaged; of SFD's generator theta), "model" (live; theta), "score" (SFD's psi),
        or "auto", the averaged ones if the file has them, otherwise the live ones. A file with the weights of one
        network allows only "auto".
    sample_size : int, optional
        Height and width of images; by default the level with attention determines it.

    Returns
    -------
    UNet2DModel
        float32 on the CPU in eval mode.
    NoiseSchedule
        beta linear from 1e-4 to 0.02, T = 1000.

    Raises
    ------
    ValueError
        If the file is damaged, contains code, or does not match such a network in every parameter.
    """
    from diffusers import UNet2DModel

    path = Path(path)
    check_choice("checkpoint_state", state, get_args(States))
    if sample_size is not None:
        check_int("sample_size", sample_size, 1)
    weights = _weights(_choose(_read(path), path, state), path)
    config = _config(weights, sample_size, path)
    converted = _embeddings(weights, path)
    unknown = []
    for name, value in weights.items():
        if _EMBEDDINGS.fullmatch(name):
            continue
        new = _renamed(name, len(config["block_out_channels"]))
        if new is None:
            unknown.append(name)
            continue
        # The checkpoint has 1 x 1 convolutions in attention, diffusers linear layers.
        linear = ".attentions." in new and value.ndim == 4 and value.shape[2:] == (1, 1)
        converted[new] = value[:, :, 0, 0] if linear else value
    try:
        with torch.random.fork_rng(devices=[]):
            unet = UNet2DModel(**config)
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} has another architecture: {error}") from error
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    wrong = {
        "missing": sorted(expected.keys() - converted.keys()),
        "unknown": sorted(unknown + list(converted.keys() - expected.keys())),
        "of another shape": sorted(
            name for name in converted.keys() & expected.keys() if tuple(converted[name].shape) != expected[name]
        ),
    }
    if any(wrong.values()):
        reasons = [f"{kind}: {', '.join(names[:4])} ({len(names)})" for kind, names in wrong.items() if names]
        raise ValueError(f"{path} has another architecture: {'; '.join(reasons)}")
    unet.load_state_dict(converted)
    register_classes(unet, config["num_class_embeds"] - 1)
    return unet.eval(), NoiseSchedule.linear()
