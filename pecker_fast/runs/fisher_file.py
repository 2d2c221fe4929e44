"""The file of a network's Fisher information: safetensors, one float32 tensor a parameter, with what it is of."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from ..files import save_tensors

FORMAT, VERSION = "pecker_fast.fisher", 1
KEY = "fisher"
MAKE = "make it with pecker-fast fisher"


@dataclass(frozen=True)
class FisherFacts:
    """What a Fisher information is of.

    Parameters
    ----------
    pretrained_sha256: of the network's weights, names and shapes.
    loss_reduction: over the dimensions of an image, of the loss whose gradients it is made of: "sum" or "mean".
    samples, timesteps: images, and timesteps in the sum of each one's losses.
    """

    pretrained_sha256: str
    loss_reduction: str
    samples: int
    timesteps: int


def save_fisher(path: str | os.PathLike, fisher: Mapping[str, Tensor], facts: FisherFacts) -> None:
    """Writes ``fisher``, a float32 tensor by parameter's name, under a temporary name, syncs and renames it."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in fisher.items()}
    save_tensors(path, tensors, {KEY: json.dumps({"format": FORMAT, "version": VERSION, **vars(facts)})})


def load_fisher(
    path: str | os.PathLike, network: nn.Module, pretrained_sha256: str, loss_reduction: str
) -> dict[str, Tensor]:
    """The Fisher information in ``path``, float32 on the CPU, by the names of ``network``'s parameters.

    ``pretrained_sha256``: of the weights of ``network``. ``loss_reduction``: of the loss that it is to stand beside.

    Raises ValueError, saying what to do, where there is no such file, it is damaged or another file, of other weights
    or of another loss, lacks a parameter, or has one of another shape, or numbers that no squares come to.
    """
    path = Path(path)
    what = f"fisher is {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{what}, where there is no file: {MAKE}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if said.get("format") != FORMAT:
                raise ValueError(f"{what}, which holds no Fisher information as pecker-fast saves it: {MAKE}")
            if said.get("version") != VERSION:
                raise ValueError(f"{what}, of version {said.get('version')!r}, expected {VERSION}: {MAKE} again")
            if said["pretrained_sha256"] != pretrained_sha256:
                raise ValueError(
                    f"{what}, which is of other weights (sha256 {said['pretrained_sha256'][:12]}) than the pretrained "
                    f"model's ({pretrained_sha256[:12]}): {MAKE} of this model"
                )
            if said["loss_reduction"] != loss_reduction:
                raise ValueError(
                    f"{what}, which is of losses with loss_reduction {said['loss_reduction']!r}, expected "
                    f"{loss_reduction!r}: give the same --loss_reduction, or {MAKE} again"
                )
            return {name: _tensor(file, name, param, what) for name, param in network.named_parameters()}
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}, which is damaged ({str(error).splitlines()[0]}): {MAKE} again") from error


def _tensor(file, name: str, param: nn.Parameter, what: str) -> Tensor:
    if name not in file.keys():  # noqa: SIM118
        raise ValueError(f"{what}, which lacks the parameter {name}: {MAKE} of this model")
    found = file.get_tensor(name)
    if found.shape != param.shape or found.dtype != torch.float32:
        raise ValueError(
            f"{what}, where {name} is {found.dtype} {tuple(found.shape)}, expected torch.float32 {tuple(param.shape)}: "
            f"{MAKE} of this model"
        )
    # NaN is not either.
    if not bool(((found >= 0) & (found < float("inf"))).all()):
        raise ValueError(f"{what}, where {name} has entries that are negative, inf or NaN: {MAKE} again")
    return found
