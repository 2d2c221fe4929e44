"""State dicts that differ in some entries, and delta files of earlier versions."""

import json
import random

import safetensors.torch
import torch

from pecker_fast.hashing import state_hash
from pecker_fast.ops import pack_bits
from tests.inputs import same_bits

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16)


def states(density: float = 0.1):
    """Weights of several dtypes and layouts, and the same with some entries changed."""
    base = {"conv.weight": torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last), "empty": torch.zeros(0, 3)}
    base |= {f"p{i}": torch.randn(random.randrange(1, 300)).mul(50).abs().to(dtype) for i, dtype in enumerate(DTYPES)}
    base |= {"scalar": torch.randn(()), "strided": torch.randn(8, 9)[:, ::2], "same": torch.randn(40)}
    base |= {"dense": torch.randn(50), "nearly": torch.randn(300), "flags": torch.rand(70) < 0.5}
    base |= {"float8": torch.randn(60).to(torch.float8_e4m3fn)}
    result = {name: value.clone() for name, value in base.items()}
    for name, value in base.items():
        share = {"same": 0.0, "dense": 1.0, "nearly": 0.95, "scalar": 1.0}.get(name, density)
        change = torch.rand(value.shape) < share
        if value.dtype == torch.bool:
            result[name] = value ^ change
        elif value.dtype == torch.float8_e4m3fn:
            bits = value.view(torch.uint8)
            result[name] = torch.where(change, bits ^ 5, bits).view(value.dtype)
        elif value.dtype == torch.uint16:
            result[name] = torch.where(change, value.view(torch.int16) ^ 9, value.view(torch.int16)).view(value.dtype)
        else:
            result[name] = torch.where(change, value + 1, value)
    return base, result


def copies(state):
    """Copies with the same strides."""
    return {name: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).copy_(v) for name, v in state.items()}


def same(a, b) -> bool:
    """Whether two state dicts hold the same bits."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and same_bits(a[name].contiguous(), b[name].contiguous()) for name in a
    )


def write_delta(path, base, result, **metadata):
    """A file as ``pecker-fast delta save`` wrote it: one bit an entry, and the values of the changed entries."""
    tensors = {}
    for name, value in result.items():
        flat = value.contiguous().reshape(-1)
        size = value.element_size()
        before, after = (x.contiguous().reshape(-1).view(torch.uint8).view(-1, size) for x in (base[name], value))
        differs = (before != after).any(1)
        if differs.any():
            tensors |= {f"{name}.mask": pack_bits(differs), f"{name}.values": flat[differs]}
    hashes = {"base": state_hash(base), "result": state_hash(result)}
    metadata = {"format": "pecker_fast.delta", "version": 1, **hashes, **metadata}
    safetensors.torch.save_file(tensors, path, {"delta": json.dumps(metadata)})
    return tensors
