"""The operators: one schema and one fake each, whatever the back end.

The C++ extension registers the CPU and CUDA kernels for these schemas with PyTorch's dispatcher. Triton and the
reference implement the same signatures in Python and are chosen above the dispatcher (see ``dispatch.py``).

Conventions
-----------
* ``Tensor[]`` arguments are *multi-tensor*: any number of tensors of any size, the empty one included, one launch
  for all. Tensors must be contiguous; shape is ignored, entry ``i`` is the row-major index.
* ``key(x) = bits(float32(|x|))`` as int32, which is monotone in the magnitude. Entries with key 0 (zeros) and keys
  above ``INF_KEY`` (NaN) are never kept by a selection and never counted by a histogram.
* A selection with ``relative_to`` and ``damping`` (both or neither) takes as ``x`` the quotient of ``scores[i]`` and
  ``relative_to[i]``, of the same size and dtype: see ``quotients`` in ``reference.py``. ``damping`` is float32, one
  value for each tensor. Thresholds are then quotients. No back end makes a tensor of the quotients.
* ``words`` are int32 mask words (see ``layout.py``); tensor ``i`` of a list starts at word ``word_offsets[i]``. Bits
  past the end of a tensor are 0 in every mask that an operator returns, and are ignored in every mask that it takes.
* Operators check shapes, dtypes and devices, raise ``ValueError``/``TypeError``/``RuntimeError`` before they write
  anything, and never synchronise with the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import RADIX_BITS, SUM_COLUMNS, num_blocks, num_words

NAMESPACE = "pecker_fast"
_library = torch.library.Library(NAMESPACE, "DEF")

SCHEMAS = {
    # Histogram of keys, one level of a radix selection. `prefixes` int32 [m]: the key bits above this level that an
    # entry must have to be counted (ignored at level 0). Returns int64 [m, 2 ** RADIX_BITS[level]]; bin b counts the
    # entries whose next RADIX_BITS[level] bits are b.
    "radix_histogram": (
        "(Tensor[] scores, Tensor prefixes, int level, Tensor[]? relative_to=None, Tensor? damping=None) -> Tensor"
    ),
    # Mask of the entries with key > keys[j], and of the first tie_limits[j] entries (tensors in order, then index)
    # with key == keys[j]. `keys` int32 [m], each >= 1; `tie_limits` int64 [m]. Returns words int32 [m, W], thresholds
    # float32 [m] (smallest kept magnitude, inf if nothing is kept), counts int64 [m] (kept), nan_count int64 [].
    "threshold_mask": (
        "(Tensor[] scores, Tensor keys, Tensor tie_limits, Tensor[]? relative_to=None, Tensor? damping=None)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # Mask of the ks[j] entries of largest magnitude over all tensors together; of equal magnitudes the lowest index
    # wins, or all of them are kept (ties_all). `ks` int64 [m], 1 <= ks[j]. Fewer are kept if fewer are neither zero
    # nor NaN. Returns what threshold_mask returns.
    "select": (
        "(Tensor[] scores, Tensor ks, bool ties_all=False, Tensor[]? relative_to=None, Tensor? damping=None)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    # Exact sums of magnitudes, as integers: int64 [n, SUM_COLUMNS]. The float32 bits of a finite entry have an exponent
    # e (1 for subnormal numbers) and a 24-bit significand; the entry adds significand << (e % 16) to window e // 16, in
    # units of 2 ** (16 window - 150). The sum of window w is column w + 2 ** 32 * column SUM_WINDOWS + w. The last
    # column counts the finite entries.
    "magnitude_sums": "(Tensor[] tensors) -> Tensor",
    # Number of set bits in each block of PACK_BLOCK entries, tensors in order: int64 [sum(num_blocks(numel))].
    "block_counts": "(Tensor words, int[] word_offsets, int[] numels) -> Tensor",
    # The entries of `dense` whose bit is set, in order; `count` is the number of set bits: [count], dense's dtype.
    "pack": "(Tensor dense, Tensor words, int count) -> Tensor",
    # The inverse: `packed` spread over `numel` entries, zero elsewhere: [numel].
    "unpack": "(Tensor packed, Tensor words, int numel) -> Tensor",
    # Entries outside the mask become +0, in place (NaN included).
    "apply_mask_": "(Tensor(a!)[] tensors, Tensor words, int[] word_offsets) -> ()",
    # accumulators[i] += grads[i] ("sum"), |grads[i]| ("abs_sum") or grads[i] ** 2 ("sq_sum"), in float32.
    "accumulate_": "(Tensor(a!)[] accumulators, Tensor[] grads, str reduce) -> ()",
    # Entries whose gradient is inf or NaN: of grads + where(mask, masked_grads, 0) as masked_adam_ forms it, after the
    # division by grad_scale. Only entries that the same masked_adam_ call would update count. int64 [].
    "count_nonfinite": (
        "(Tensor?[] grads, Tensor?[] masked_grads, Tensor? words, int[] word_offsets, Tensor? grad_scale=None)"
        " -> Tensor"
    ),
    # One Adam step, see masked_adam_ in reference.py for the equations.
    "masked_adam_": (
        "(Tensor(a!)[] params, Tensor?[] grads, Tensor?[] masked_grads,"
        " Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs,"
        " Tensor(e!)[] masters, Tensor(f!)[] emas, Tensor(g!)[] counts,"
        " Tensor steps, Tensor lr, Tensor? bias_table,"
        " Tensor? words, int[] word_offsets, Tensor? packed_offsets,"
        " Tensor? grad_scale, Tensor? found_inf, *,"
        " float beta1, float beta2, float eps, float weight_decay=0.0, bool decoupled_weight_decay=False,"
        " bool maximize=False, float? clip_value=None, float? max_update=None, bool retain_variance=False,"
        " bool zero_nonfinite=False, float? ema_decay=None, bool ema_everywhere=False,"
        " bool stochastic_rounding=False, int seed=0, int[] tensor_numbers=[]) -> ()"
    ),
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


def op_overload(name: str) -> torch._ops.OpOverload:
    """``torch.ops.pecker_fast.<name>.default``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _fake(name):
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


def _fake_mask(scores: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = rows.shape[0]
    width = sum(num_words(score.numel()) for score in scores)
    return (
        rows.new_empty((m, width), dtype=torch.int32),
        rows.new_empty((m,), dtype=torch.float32),
        rows.new_empty((m,), dtype=torch.int64),
        rows.new_empty((), dtype=torch.int64),
    )


@_fake("radix_histogram")
def _(scores, prefixes, level, relative_to=None, damping=None):
    return prefixes.new_empty((prefixes.shape[0], 1 << RADIX_BITS[level]), dtype=torch.int64)


@_fake("threshold_mask")
def _(scores, keys, tie_limits, relative_to=None, damping=None):
    return _fake_mask(scores, keys)


@_fake("select")
def _(scores, ks, ties_all=False, relative_to=None, damping=None):
    return _fake_mask(scores, ks)


@_fake("magnitude_sums")
def _(tensors):
    device = tensors[0].device if tensors else None
    return torch.empty((len(tensors), SUM_COLUMNS), dtype=torch.int64, device=device)


@_fake("block_counts")
def _(words, word_offsets, numels):
    return words.new_empty((sum(num_blocks(n) for n in numels),), dtype=torch.int64)


@_fake("pack")
def _(dense, words, count):
    return dense.new_empty((count,))


@_fake("unpack")
def _(packed, words, numel):
    return packed.new_empty((numel,))


@_fake("apply_mask_")
def _(tensors, words, word_offsets):
    return None


@_fake("accumulate_")
def _(accumulators, grads, reduce):
    return None


@_fake("count_nonfinite")
def _(grads, masked_grads, words, word_offsets, grad_scale=None):
    tensors = [g for g in [*grads, *masked_grads] if g is not None]
    device = tensors[0].device if tensors else words.device if words is not None else None
    return torch.empty((), dtype=torch.int64, device=device)


@_fake("masked_adam_")
def _(params, *args, **kwargs):
    return None


def register_python_kernel(name: str, device_type: str, kernel) -> None:
    """Registers a Python function as the dispatcher's kernel of operator ``name`` on "cpu" or "cuda" tensors."""
    _library.impl(name, kernel, {"cpu": "CPU", "cuda": "CUDA"}[device_type])
