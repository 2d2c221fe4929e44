"""sha256 of files and of weights."""

import hashlib
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of a file, in hexadecimal. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        # Python 3.10 has no hashlib.file_digest.
        digest = hashlib.sha256()
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
        return digest.hexdigest()


def state_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over weights with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    # Not items(): a state may make each value when it is asked for it.
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_hash(network: nn.Module) -> str:
    """sha256 over a network's state dict: weights, names, shapes and dtypes."""
    return state_hash(network.state_dict())
