"""The file of a network's Fisher information: safetensors, one float32 tensor a parameter, and what it belongs to."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..files import save_tensors

FORMAT, VERSION = "pecker_fast.fisher", 1
KEY = "fisher"
MAKE = "make it with pecker-fast fisher"


@dataclass(frozen=True)
class FisherFacts:
    """What a Fisher information belongs to.

    Parameters
    ----------
    pretrained_sha256 : str
        Of the network's weights, names and shapes.
    loss_reduction : {"sum", "mean"}
        Over the dimensions of an image, of the loss whose gradients were squared.
    samples, timesteps : int
        Number of images, and of timesteps over which the losses of each are summed.
    """

    pretrained_sha256: str
    loss_reduction: str
    samples: int
    timesteps: int


def save_fisher(path: str | os.PathLike, fisher: Mapping[str, Tensor], facts: FisherFacts) -> None:
    """Write a Fisher information, all or nothing.

    Parameters
    ----------
    path : str or PathLike
        The file.
    fisher : Mapping
        Name of a parameter to a float32 tensor.
    facts : FisherFacts
        What it belongs to.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in fisher.items()}
    save_tensors(path, tensors, {KEY: json.dumps({"format": FORMAT, "version": VERSION, **vars(facts)})})


def load_fisher(
    path: str | os.PathLike, network: nn.Module, pretrained_sha256: str, loss_reduction: str
) -> dict[str, Tensor]:
    """Read a Fisher information.

    Parameters
    ----------
    path : str or PathLike
        The file.
    network : nn.Module
        The network it is for.
    pretrained_sha256 : str
        Of the network's weights.
    loss_reduction : {"sum", "mean"}
        Of the loss that it is used with.

    Returns
    -------
    dict
        Name of each parameter to a float32 tensor on the CPU.

    Raises
    ------
    ValueError
        If there is no such file, it is damaged, belongs to other weights or another loss, lacks a parameter, or has
        tensors of other shapes or with entries that cannot be sums of squares.
    """
    path = Path(path)
    what = f"fisher is {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{what}, but there is no such file: {MAKE}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if facts.get("format") != FORMAT:
                raise ValueError(f"{what}, which holds no Fisher information as pecker-fast saves it: {MAKE}")
            if facts.get("version") != VERSION:
                raise ValueError(f"{what}, of version {facts.get('version')!r}, expected {VERSION}: {MAKE} again")
            if facts["pretrained_sha256"] != pretrained_sha256:
                raise ValueError(
                    f"{what}, which is of other weights (sha256 {facts['pretrained_sha256'][:12]}) than the pretrained "
                    f"model's ({pretrained_sha256[:12]}): {MAKE} of this model"
                )
            if facts["loss_reduction"] != loss_reduction:
                raise ValueError(
                    f"{what}, which is of losses with loss_reduction {facts['loss_reduction']!r}, expected "
                    f"{loss_reduction!r}: give the same --loss_reduction, or {MAKE} again"
                )
            return {name: _tensor(file, name, param, what) for name, param in network.named_parameters()}
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}, which is damaged ({str(error).splitlines()[0]}): {MAKE} again") from error


def _tensor(file: Any, name: str, param: nn.Parameter, what: str) -> Tensor:
    if name not in file.keys():  # noqa: SIM118
        raise ValueError(f"{what}, which lacks the parameter {name}: {MAKE} of this model")
    value = file.get_tensor(name)
    if value.shape != param.shape or value.dtype != torch.float32:
        raise ValueError(
            f"{what}, where {name} is {value.dtype} {tuple(value.shape)}, expected torch.float32 {tuple(param.shape)}: "
            f"{MAKE} of this model"
        )
    # NaN fails this, too.
    if not bool(((value >= 0) & (value < float("inf"))).all()):
        raise ValueError(f"{what}, where {name} has entries that are negative, inf or NaN: {MAKE} again")
    return value
