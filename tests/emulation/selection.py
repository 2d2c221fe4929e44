"""The CUDA selection on CPU tensors, by the emulator. Same signatures as the operators, and a tuning."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pecker_fast.ops.layout import RADIX_BITS, SUM_COLUMNS, num_words

from . import library

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KERNELS = ("multi_tensor", "select", "select_sample", "select_mask", "select_radix", "select_sums")

BRACKET, FALLBACK, DIRECT = range(3)
"""How a row was selected."""

MAX_ROWS = 8
"""kMaxRows of csrc/cuda/select.h."""


@dataclass
class Tuning:
    """``SelectTuning`` of csrc/cuda/select.h; by default the sampled path is taken at any size."""

    blocks: int = 3
    min_sampled_bytes: int = 1
    max_log_clusters: int = 17
    sigmas: float = 5.0
    slack: float = 16.0
    capacity: int = 0


class _Tuning(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_int),
        ("min_sampled_bytes", ctypes.c_int64),
        ("max_log_clusters", ctypes.c_int),
        ("sigmas", ctypes.c_float),
        ("slack", ctypes.c_float),
        ("capacity", ctypes.c_int64),
    )


@cache
def _library() -> ctypes.CDLL:
    loaded = library.load("selection", _KERNELS)
    loaded.last_error.restype = loaded.launched.restype = ctypes.c_char_p
    return loaded


def launched() -> list[str]:
    """The kernels launched since the last call, and "memset", in order."""
    return _library().launched().decode().split()


def set_order(name: str) -> None:
    _library().set_order(("forward", "reverse", "shuffled").index(name))


def _call(name: str, *args) -> None:
    if getattr(_library(), name)(*args) != 0:
        raise RuntimeError(_library().last_error().decode())


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _scores(scores: Sequence[Tensor]) -> tuple:
    def array(values):
        return (ctypes.c_int64 * (len(scores) + 1))(*values)

    assert all(t.is_contiguous() for t in scores)
    return (
        len(scores),
        array(t.data_ptr() for t in scores),
        array(t.numel() for t in scores),
        array(_TYPES[t.dtype] for t in scores),
    )


Relative = tuple[Sequence[Tensor], Tensor]
"""What scores are relative to, and the damping of each tensor."""


def _relative(relative: Relative | None) -> tuple:
    if relative is None:
        return (None, None)
    others, damping = relative
    assert all(t.is_contiguous() for t in others) and damping.dtype == torch.float32
    return ((ctypes.c_int64 * (len(others) + 1))(*(t.data_ptr() for t in others)), _pointer(damping))


def _tuning(tuning: Tuning):
    return ctypes.byref(_Tuning(*(getattr(tuning, name) for name, _ in _Tuning._fields_)))


def _outputs(scores: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    words = torch.full((rows, sum(num_words(t.numel()) for t in scores)), 0x5A5A5A5A, dtype=torch.int32)
    return (
        words,
        torch.full((rows,), float("nan")),
        torch.full((rows,), -7, dtype=torch.int64),
        torch.full((), -7, dtype=torch.int64),
    )


def layout_constants() -> list[int]:
    """WORD_BITS, PACK_BLOCK, INF_KEY and RADIX_BITS as C++ has them."""
    values = (ctypes.c_int64 * 6)()
    _library().layout_constants(values)
    return list(values)


@dataclass
class Plan:
    """How a selection runs: bytes of memory besides scores and mask, rows at a time, candidates of a row."""

    bytes: int
    group: int
    capacity: int
    sampled: bool


def plan(numels: Sequence[int], dtypes: Sequence[torch.dtype], rows: int = 1, tuning: Tuning | None = None) -> Plan:
    """The plan of a selection on a GPU, or with a tuning."""
    n, out = len(numels), (ctypes.c_int64 * 4)()
    sizes, types = (ctypes.c_int64 * n)(*numels), (ctypes.c_int64 * n)(*(_TYPES[dtype] for dtype in dtypes))
    _library().selection_plan(n, sizes, types, ctypes.c_int64(rows), _tuning(tuning) if tuning else None, out)
    return Plan(out[0], out[1], out[2], bool(out[3]))


def select(scores, ks, ties_all=False, tuning: Tuning | None = None, relative: Relative | None = None):
    """The four results, and for each row how it was selected."""
    out = _outputs(scores, len(ks))
    used = torch.full((len(ks) + 1,), -1, dtype=torch.int32)
    tuning = _tuning(tuning or Tuning())
    tail = (tuning, *map(_pointer, out), _pointer(used))
    rows = (_pointer(ks), ctypes.c_int64(len(ks)), int(ties_all))
    _call("emulated_select", *_scores(scores), *_relative(relative), *rows, *tail)
    return out, used[: len(ks)].tolist()


def threshold_mask(scores, keys, tie_limits, relative: Relative | None = None):
    out = _outputs(scores, len(keys))
    rows = (_pointer(keys), _pointer(tie_limits), ctypes.c_int64(len(keys)))
    inputs = (*_scores(scores), *_relative(relative))
    _call("emulated_threshold_mask", *inputs, *rows, _tuning(Tuning()), *map(_pointer, out))
    return out


def radix_histogram(scores, prefixes, level, relative: Relative | None = None):
    out = torch.full((len(prefixes), 1 << RADIX_BITS[level]), -7, dtype=torch.int64)
    rows = (_pointer(prefixes), ctypes.c_int64(len(prefixes)))
    _call("emulated_radix_histogram", *_scores(scores), *_relative(relative), *rows, level, 3, _pointer(out))
    return out


def magnitude_sums(tensors, blocks: int):
    out = torch.full((len(tensors), SUM_COLUMNS), -7, dtype=torch.int64)
    _call("emulated_magnitude_sums", *_scores(tensors), blocks, _pointer(out))
    return out
