"""Checkpoints of the class-conditional DDPM code that SFD, SalUn and Selective Amnesia share, as diffusers' U-Net.

That network concatenates the embeddings of time and class; ``UNet2DModel`` adds them. With an embedding twice as wide
the conversion is exact: the time's MLP fills the first half, a table of the class MLP's outputs the second, and zeros
the rest. It computes the same function. Trained on, it is a slightly larger network: the class MLP has become a table
with a row for each class and one for "no condition", and the zeros are parameters like others.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..checks import check_int
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.unet import register_classes

if TYPE_CHECKING:
    from diffusers import UNet2DModel

# They all have self-attention where images are this high, and nowhere else: that tells the image size.
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
# Not copied: the embeddings, which are made into others.
_EMBEDDINGS = re.compile(r"(temb|cemb)\.dense\.[01]\.(weight|bias)|classes_emb\.weight|null_classes_emb")


# How lines begin in which torch says what is wrong with a pickle: behind advice to load it unsafely.
_TORCH_SAYS = ("WeightsUnpickler error: ", "Trying to load ")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    reasons = [line for line in lines if line.startswith(_TORCH_SAYS)]
    return next(iter([*reasons, *lines]), type(error).__name__)


def _read(path: Path) -> Any:
    """What is in the file, without running any code in it."""
    try:
        # torch does not look at the checksums: a bit that has flipped would become a wrong weight.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it is damaged (its checksum differs)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is no checkpoint; code in it is not run: "
            f"{_first_line(error)}"
        ) from error
    except Exception as error:
        # Damaged pickles make torch raise almost anything: KeyError, TypeError, AttributeError, struct.error...
        raise ValueError(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error


def _choose(found: Any, path: Path, state: States) -> Mapping[str, Any]:
    """The weights that are meant.

    The files hold [model, optimizer, step] or [model, optimizer, step, EMA] (pretraining, SalUn, Selective Amnesia),
    [psi, its optimizer, theta, its optimizer, step] and perhaps theta's EMA (SFD), or one network's weights alone.
    """
    if isinstance(found, Mapping):
        if state != "auto":
            raise ValueError(f"{path} holds the weights of one network: checkpoint_state is {state!r}, expected auto")
        return found
    if not isinstance(found, (list, tuple)) or not 3 <= len(found) <= 6:
        kind = f"{type(found).__name__} of {len(found)}" if isinstance(found, (list, tuple)) else type(found).__name__
        raise ValueError(f"{path} holds a {kind}, expected a checkpoint of SFD, SalUn or Selective Amnesia")
    two = len(found) >= 5
    places = {"model": 2 if two else 0}
    if two:
        places["score"] = 0
    if len(found) in (4, 6):
        places["ema"] = len(found) - 1
    there = {name: found[place] for name, place in places.items() if isinstance(found[place], Mapping)}
    wanted = next((name for name in ("ema", "model") if name in there), "") if state == "auto" else state
    if wanted not in there:
        raise ValueError(
            f"{path} has no weights {wanted or 'at all'} (checkpoint_state), it has {', '.join(there) or 'none'}"
        )
    return there[wanted]


def _weights(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """float32 weights by name, without what DataParallel puts in front."""
    weights = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} has {name!r} that is no tensor, expected the weights of one network")
        short = name.removeprefix("module.")
        if short in weights:
            raise ValueError(f"{path} has {short} twice, with and without module. before it")
        weights[short] = value.detach().float()
    return weights


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers follow ``pattern`` in the names."""
    return len({match[1] for match in map(re.compile(pattern + r"\.(\d+)\.").match, weights) if match})


def _get(weights: Mapping[str, Tensor], name: str, ndim: int, path: Path) -> Tensor:
    if name not in weights or weights[name].ndim != ndim:
        raise ValueError(f"{path} has no {name} of {ndim} dimensions: it is of another architecture")
    return weights[name]


def _config(weights: Mapping[str, Tensor], sample_size: int | None, path: Path) -> dict[str, Any]:
    """The configuration of ``UNet2DModel``, read off names and shapes."""
    channels = _get(weights, "conv_in.weight", 4, path).shape[1]
    levels, blocks = _count(weights, "down"), _count(weights, r"down\.0\.block")
    if not levels or not blocks:
        raise ValueError(f"{path} has no down.0.block: it is of another architecture")
    outs = tuple(_get(weights, f"down.{i}.block.0.conv1.weight", 4, path).shape[0] for i in range(levels))
    attention = [_count(weights, rf"down\.{i}\.attn") > 0 for i in range(levels)]
    if sample_size is None:
        if sum(attention) != 1:
            raise ValueError(
                f"{path} has attention in {sum(attention)} levels: sample_size is needed, it cannot be told"
            )
        sample_size = ATTENTION_RESOLUTION * 2 ** attention.index(True)
    return {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": _get(weights, "conv_out.weight", 4, path).shape[0],
        "block_out_channels": outs,
        "layers_per_block": blocks,
        "down_block_types": tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        "up_block_types": tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
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
    """diffusers' name of a parameter, None where there is none."""
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
    # Counted from the finest level there, in the order of computing here.
    level = int(way[2]) if way[1] == "down" else levels - 1 - int(way[2])
    if sampled:
        return f"{way[1]}_blocks.{level}.{way[1]}samplers.0.conv.{kind}"
    layer = (_ATTENTION if inner[3] == "attn" else _RESNET).get(inner[5])
    part = "attentions" if inner[3] == "attn" else "resnets"
    return None if layer is None else f"{way[1]}_blocks.{level}.{part}.{inner[4]}.{layer}.{kind}"


def _embeddings(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The time's MLP in the first half of an embedding of twice the width, a table of the class MLP in the second."""
    width = _get(weights, "conv_in.weight", 4, path).shape[0]
    size = _get(weights, "temb.dense.1.weight", 2, path).shape[0]

    def get(name: str, *shape: int) -> Tensor:
        value = _get(weights, name, len(shape), path)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{path} is of another architecture: {name} has shape {tuple(value.shape)}, expected {shape}"
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
    """A checkpoint of the public DDPM code of SFD, SalUn or Selective Amnesia: the network, float32 on the CPU in eval
    mode, and its schedule (beta linear from 1e-4 to 0.02, T = 1000).

    Parameters
    ----------
    path: the file. It is read without running any code in it.
    state: which weights: "ema" (averaged; of SFD's generator theta), "model" (live; theta), "score" (SFD's psi);
        "auto": averaged where there are any, otherwise live. A file with the weights of one network has "auto" alone.
    sample_size: height and width of images; None: told by the level that has attention.

    The label after the last class is the null label. The result equals the original network's, conditional and not, to
    rounding. Raises ValueError where the file is damaged, holds code, or is not such a network in every parameter.
    """
    from diffusers import UNet2DModel

    path = Path(path)
    if state not in ("auto", "ema", "model", "score"):
        raise ValueError(f"checkpoint_state is {state!r}, expected auto, ema, model or score")
    if sample_size is not None:
        check_int("sample_size", sample_size, 1)
    weights = _weights(_choose(_read(path), path, state), path)
    config = _config(weights, sample_size, path)
    made = _embeddings(weights, path)
    unknown = []
    for name, value in weights.items():
        if _EMBEDDINGS.fullmatch(name):
            continue
        new = _renamed(name, len(config["block_out_channels"]))
        if new is None:
            unknown.append(name)
            continue
        # Attention is a linear layer there and a convolution of one pixel here.
        linear = ".attentions." in new and value.ndim == 4 and value.shape[2:] == (1, 1)
        made[new] = value[:, :, 0, 0] if linear else value
    try:
        with torch.random.fork_rng(devices=[]):
            unet = UNet2DModel(**config)
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is of another architecture: {error}") from error
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    wrong = {
        "missing": sorted(expected.keys() - made.keys()),
        "unknown": sorted(unknown + list(made.keys() - expected.keys())),
        "of another shape": sorted(n for n in made.keys() & expected.keys() if tuple(made[n].shape) != expected[n]),
    }
    if any(wrong.values()):
        said = "; ".join(f"{kind}: {', '.join(names[:4])} ({len(names)})" for kind, names in wrong.items() if names)
        raise ValueError(f"{path} is of another architecture: {said}")
    unet.load_state_dict(made)
    register_classes(unet, config["num_class_embeds"] - 1)
    return unet.eval(), NoiseSchedule.linear()
