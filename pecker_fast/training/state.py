"""Trees of tensors and plain values as safetensors files: no pickle, equal states give equal bytes."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

KEY = "pecker_fast.state"


def _flatten(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON skeleton of ``value``; its tensors are added to ``tensors``. Lists are JSON lists, others are tagged."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        # A copy: safetensors refuses tensors that share memory, as step counts do.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # As text, since JSON has neither inf nor NaN.
        return {"float": value.hex()}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{place}[{i}]", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise TypeError(f"{place} has the key {key!r}, expected strings and integers")
        return {"dict": [[key, _flatten(item, f"{place}[{key!r}]", tensors)] for key, item in value.items()]}
    raise TypeError(f"{place} is {type(value).__name__}, expected tensors, numbers, strings, None, dicts or lists")


def _restore(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, list):
        return [_restore(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float.fromhex(value)
    if kind == "tuple":
        return tuple(_restore(item, tensors) for item in value)
    return {key: _restore(item, tensors) for key, item in value}


def save_state(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of tensors and plain values.

    Parameters
    ----------
    path : path
        File to write.
    tree : object
        Dicts (string or integer keys), lists, tuples, tensors of any dtype and shape, None, bool, int, float and str.

    Raises
    ------
    TypeError
        For any other value, naming its place, before the file is opened.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(tree, "state", tensors)
    data = safetensors.torch.save(tensors, {KEY: json.dumps(skeleton)})
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load_state(path: str | os.PathLike) -> Any:
    """The tree that ``save_state`` wrote, bit for bit, with its tensors on the CPU. ValueError for any other file."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            skeleton = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _restore(skeleton, tensors)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a state as save_state writes it: {error}") from error
