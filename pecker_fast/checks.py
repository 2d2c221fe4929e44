"""Argument checks shared by the package. Each raises before anything is computed and names the argument."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .names import is_set, nearest

LARGEST = (1 << 63) - 1
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_batch(name: str, value: Tensor) -> None:
    """A floating tensor of at least one sample with at least one dimension beside the batch's."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name} is {value.dtype}, expected a floating dtype")
    if value.ndim < 2 or value.shape[0] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (B, ...) with B >= 1")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` is a batch of the shape of ``other``."""
    check_batch(name, value)
    if value.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected that of {other_name}, {tuple(other.shape)}")


def check_left_out(values: Mapping[str, Any], defaults: Mapping[str, Any], names: Iterable[str], why: str) -> None:
    """The options ``names``, which would not be used, have their defaults and are not set by the words of a command;
    ``why`` ends the sentence "but ..."."""
    for name in names:
        if values[name] != defaults[name] or is_set(name):
            raise ValueError(f"{name} is {values[name]!r}, but {why}: expected it to be left out")


def check_int(name: str, value: int, low: int, high: int | None = None) -> None:
    """``value`` is an integer, low <= value < high. Without ``high`` it fits into 64 bits, as in tensors and files."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if value < low or (high is not None and value >= high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high - 1}"
        raise ValueError(f"{name} is {value}, expected {allowed}")
    if value > LARGEST:
        raise ValueError(f"{name} is {value}, expected at most {LARGEST}")


def check_number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> None:
    """``value`` is a finite number from ``low`` to ``high``; ``open_low`` and ``open_high`` exclude the bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, expected a number")
    too_low = value <= low if open_low else value < low
    too_high = value >= high if open_high else value > high
    if not math.isfinite(value) or too_low or too_high:
        bounds = f"{'above' if open_low else 'at least'} {low:g}"
        if high != math.inf:
            bounds += f", {'below' if open_high else 'at most'} {high:g}"
        raise ValueError(f"{name} is {value}, expected a number {bounds}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise ValueError(f"{name} is {value!r}, expected one of {known}{nearest(value, choices)}")


def check_utf8(name: str, value: Any) -> None:
    """A path or a text can be written as UTF-8. Names of files on Linux need not be."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        shown = str(value).encode(errors="backslashreplace").decode()
        raise ValueError(f"{name} is {shown}, which is not UTF-8: rename it") from error


def check_literals(options: Any) -> None:
    """Every field of a dataclass that is annotated ``Literal[...]`` has one of the values named there."""
    hints = get_type_hints(type(options))
    for item in fields(options):
        if get_origin(hints[item.name]) is Literal:
            check_choice(item.name, getattr(options, item.name), get_args(hints[item.name]))


def check_indices(name: str, value: Tensor, size: int | None) -> None:
    """An integer tensor with entries from 0 to size - 1. Entries on a GPU are not read: that would synchronise; fake
    tensors have none."""
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} is {value.dtype}, expected integers")
    if size is None or value.device.type != "cpu" or value.numel() == 0 or type(value).__name__ == "FakeTensor":
        return
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= size:
        raise ValueError(f"{name} has {low if low < 0 else high}, expected values from 0 to {size - 1}")


def check_timesteps(name: str, t: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """``t`` as an integer tensor of shape (batch,) on ``device``."""
    if not isinstance(t, Tensor):
        check_int(name, t, 0)
        return torch.full((batch,), t, dtype=torch.int64, device=device)
    check_indices(name, t, None)
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, batch)):
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected () or ({batch},), the batch's")
    return t.to(device).expand(batch)


def as_labels(labels: Tensor | Sequence[int], size: int | None) -> Tensor:
    """``labels`` as int64 of shape (N,) on the CPU, entries from 0 to size - 1, N >= 1."""
    if not isinstance(labels, Tensor):
        labels = list(labels)
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int):
                raise TypeError(f"labels has {label!r}, expected integers")
        labels = torch.tensor(labels, dtype=torch.int64)
    labels = labels.detach().cpu()
    check_indices("labels", labels, size)
    if labels.ndim != 1 or labels.numel() == 0:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected (N,) with N >= 1")
    return labels.long()
