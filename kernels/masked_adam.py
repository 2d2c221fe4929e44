"""masked_adam_: one Adam step over all tensors. The equations are in ``masked_adam_`` of ``ops/reference.py``.

Two launches: first the values of each tensor (bias corrections in float64, the hash of its random bits), then the step.
Every hyper-parameter that a schedule may change is read from device memory, so a new value recompiles nothing.

Fixed configuration: tiles of 2,048 entries with 8 warps are 8 entries a thread and array, which is two 16-byte accesses
in flight for each of up to 8 arrays and fits the registers of full occupancy but one step. Plain and joint steps access
whole tiles in vectors. Masked steps are predicated entry by entry, for which the lanes of a warp take the 32 entries of
one mask word: vectors would be split into scattered accesses.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..ops.layout import PACK_BLOCK, num_blocks
from .adam_tile import HASH_AT, LOG2_BETA1_AT, LOG2_BETA2_AT, step_tile
from .tables import Pointers, chunks, float64_table, int64_table, numels_of, on_device, pointers, scratch
from .tiles import FLOAT_TYPES, kernel, load_words, mix, popcount, tile_length

BLOCK = 2048
NUM_WARPS = 8
_TENSORS_PER_PROGRAM = 128


@kernel
def prepare_kernel(steps, numbers, hyper, corrections, hashes, count, BLOCK: tl.constexpr):
    """Write for each tensor 1 / bc1 and 1 / sqrt(bc2), and the hash of seed, step and tensor for its random bits."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tensor < count
    step = tl.load(steps + tensor, mask=here, other=1)
    wide = step.to(tl.float64)
    inverse1 = 1.0 / (1.0 - tl.exp2(wide * tl.load(hyper + LOG2_BETA1_AT)))
    inverse2 = 1.0 / tl.sqrt(1.0 - tl.exp2(wide * tl.load(hyper + LOG2_BETA2_AT)))
    tl.store(corrections + 2 * tensor, inverse1.to(corrections.dtype.element_ty), mask=here)
    tl.store(corrections + 2 * tensor + 1, inverse2.to(corrections.dtype.element_ty), mask=here)
    state = tl.load(hyper + HASH_AT).to(tl.int64).to(tl.uint32)
    state = mix(state ^ step.to(tl.int64).to(tl.uint32))
    state = mix(state ^ tl.load(numbers + tensor, mask=here, other=0).to(tl.uint32))
    tl.store(hashes + tensor, state.to(tl.int64), mask=here)


@kernel
def masked_adam_kernel(
    # Not "params": triton's own generated code has a variable of that name.
    param_addresses,
    grads,
    masked_grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    masters,
    emas,
    counts,
    numels,
    chunk_table,
    n_chunks,
    words,
    word_offsets,
    packed_offsets,
    first_blocks,
    corrections,
    hashes,
    hyper,
    lr,
    bias_table,
    bias_rows,
    grad_scale,
    found_inf,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_TOP: tl.constexpr,
    MASKED: tl.constexpr,
    JOINT: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    PACKED: tl.constexpr,
    GRADS_OPTIONAL: tl.constexpr,
    HAS_M: tl.constexpr,
    HAS_MAX: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_EMA: tl.constexpr,
    SCALED: tl.constexpr,
    GUARDED: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CLIP: tl.constexpr,
    MAX_UPDATE: tl.constexpr,
    RETAIN: tl.constexpr,
    ZERO_NONFINITE: tl.constexpr,
    EMA_EVERYWHERE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    PACK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if GUARDED:
        if tl.load(found_inf) != 0:
            return
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_table + chunk)
    start = tl.load(chunk_table + n_chunks + chunk)
    length = tile_length(start, tl.load(numels + tensor), BLOCK)
    grad_address = tl.load(grads + tensor)
    masked_grad_address = grad_address
    if JOINT:
        masked_grad_address = tl.load(masked_grads + tensor)
    # Without any gradient the tensor is left out of the step.
    if (grad_address == 0) & (masked_grad_address == 0):
        return
    tile_words = length
    packed_start = start
    if HAS_WORDS:
        tensor_words = words + tl.load(word_offsets + tensor)
        tile_words = load_words(tensor_words + start // 32, length, BLOCK // 32)
        if MASKED and not EMA_EVERYWHERE:
            if tl.max((tile_words != 0).to(tl.int32), axis=0) == 0:
                return
        if PACKED:
            block = start // PACK_BLOCK
            rows = tl.arange(0, PACK_BLOCK // 32)
            earlier = rows < ((start - block * PACK_BLOCK) // 32).to(tl.int32)
            before = tl.load(tensor_words + block * (PACK_BLOCK // 32) + rows, mask=earlier, other=0)
            packed_start = tl.load(packed_offsets + tl.load(first_blocks + tensor) + block)
            packed_start += tl.sum(popcount(before), axis=0)
    moments = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    extras = (masters, emas, counts)
    param_address = tl.load(param_addresses + tensor)
    if MASKED:
        step_tile(
            param_address, grad_address, masked_grad_address, moments, extras, tensor, start, length, tile_words,
            packed_start, corrections, hashes, hyper, lr, bias_table, bias_rows, grad_scale,
            DTYPE, COMPUTE, COUNT, COUNT_TOP, MASKED, JOINT, HAS_WORDS, PACKED, GRADS_OPTIONAL, HAS_M, HAS_MAX,
            HAS_MASTER, HAS_EMA, SCALED, COUPLED, DECOUPLED, MAXIMIZE, CLIP, MAX_UPDATE, RETAIN, ZERO_NONFINITE,
            EMA_EVERYWHERE, STOCHASTIC, False, False, BLOCK,
        )  # fmt: skip
    elif length == BLOCK:
        step_tile(
            param_address, grad_address, masked_grad_address, moments, extras, tensor, start, length, tile_words,
            packed_start, corrections, hashes, hyper, lr, bias_table, bias_rows, grad_scale,
            DTYPE, COMPUTE, COUNT, COUNT_TOP, MASKED, JOINT, HAS_WORDS, PACKED, GRADS_OPTIONAL, HAS_M, HAS_MAX,
            HAS_MASTER, HAS_EMA, SCALED, COUPLED, DECOUPLED, MAXIMIZE, CLIP, MAX_UPDATE, RETAIN, ZERO_NONFINITE,
            EMA_EVERYWHERE, STOCHASTIC, True, ALIGNED, BLOCK,
        )  # fmt: skip
    else:
        step_tile(
            param_address, grad_address, masked_grad_address, moments, extras, tensor, start, length, tile_words,
            packed_start, corrections, hashes, hyper, lr, bias_table, bias_rows, grad_scale,
            DTYPE, COMPUTE, COUNT, COUNT_TOP, MASKED, JOINT, HAS_WORDS, PACKED, GRADS_OPTIONAL, HAS_M, HAS_MAX,
            HAS_MASTER, HAS_EMA, SCALED, COUPLED, DECOUPLED, MAXIMIZE, CLIP, MAX_UPDATE, RETAIN, ZERO_NONFINITE,
            EMA_EVERYWHERE, STOCHASTIC, False, ALIGNED, BLOCK,
        )  # fmt: skip


_U32 = 0xFFFFFFFF


def _mix(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & _U32
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & _U32
    return x ^ (x >> 16)


def _seed_hash(seed: int) -> int:
    return _mix((seed & _U32) ^ _mix(((seed >> 32) + 0x9E3779B9) & _U32))


def masked_adam_(
    params,
    grads,
    masked_grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    masters,
    emas,
    counts,
    steps,
    lr,
    bias_table,
    words,
    word_offsets,
    packed_offsets,
    grad_scale,
    found_inf,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
    max_update: float | None = None,
    retain_variance: bool = False,
    zero_nonfinite: bool = False,
    ema_decay: float | None = None,
    ema_everywhere: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
    tensor_numbers: Sequence[int] = (),
    block: int = BLOCK,
) -> None:
    if not params:
        return
    device, dtype = params[0].device, params[0].dtype
    numels = numels_of(params)
    joint = len(masked_grads) > 0
    masked = words is not None and not joint
    double = dtype == torch.float64
    with on_device(device):
        work = chunks(numels, block, device)
        if work.count == 0:
            return
        param_table = pointers(params, device)
        tables = [
            pointers(tensors, device) if tensors else param_table
            for tensors in (grads, masked_grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, emas, counts)
        ]
        hyper = float64_table(
            (
                eps,
                weight_decay,
                clip_value or 0.0,
                max_update or 0.0,
                1 - ema_decay if ema_decay is not None else 0.0,
                beta2,
                1 - beta1,
                1 - beta2,
                math.log2(beta1) if beta1 else -math.inf,
                math.log2(beta2) if beta2 else -math.inf,
                float(_seed_hash(seed)),
            ),
            device,
        )
        compute = torch.float64 if double else torch.float32
        corrections = scratch("corrections", (len(params), 2), compute, device)
        hashes = scratch("hashes", (len(params),), torch.int64, device)
        numbers = int64_table(tensor_numbers or range(len(params)), device)
        prepare_kernel[(triton.cdiv(len(params), _TENSORS_PER_PROGRAM),)](
            steps, numbers, hyper, corrections, hashes, len(params), BLOCK=_TENSORS_PER_PROGRAM, num_warps=4
        )
        unused = hashes
        masked_adam_kernel[(work.count,)](
            param_table.table,
            *[table.table for table in tables],
            int64_table(numels, device),
            work.table,
            work.count,
            unused if words is None else words,
            unused if words is None else int64_table(word_offsets, device),
            unused if packed_offsets is None else packed_offsets,
            unused if packed_offsets is None else int64_table(_first_blocks(numels), device),
            corrections,
            hashes,
            hyper,
            lr,
            bias_table if counts else corrections,
            bias_table.shape[0] if counts else 0,
            unused if grad_scale is None else grad_scale,
            unused if found_inf is None else found_inf,
            DTYPE=FLOAT_TYPES[dtype],
            COMPUTE=tl.float64 if double else tl.float32,
            COUNT=None if not counts else tl.int16 if counts[0].dtype == torch.int16 else tl.int32,
            COUNT_TOP=torch.iinfo(counts[0].dtype).max if counts else 0,
            MASKED=masked,
            JOINT=joint,
            HAS_WORDS=words is not None,
            PACKED=packed_offsets is not None,
            GRADS_OPTIONAL=joint and _some_none(tables[:2]),
            HAS_M=len(exp_avgs) > 0,
            HAS_MAX=len(max_exp_avg_sqs) > 0,
            HAS_MASTER=len(masters) > 0,
            HAS_EMA=len(emas) > 0,
            SCALED=grad_scale is not None,
            GUARDED=found_inf is not None,
            COUPLED=weight_decay != 0 and not decoupled_weight_decay,
            DECOUPLED=weight_decay != 0 and decoupled_weight_decay,
            MAXIMIZE=maximize,
            CLIP=clip_value is not None,
            MAX_UPDATE=max_update is not None,
            RETAIN=retain_variance,
            ZERO_NONFINITE=zero_nonfinite,
            EMA_EVERYWHERE=masked and ema_everywhere,
            STOCHASTIC=stochastic_rounding and not masters and dtype in (torch.bfloat16, torch.float16),
            ALIGNED=all(table.aligned for table in (param_table, *tables)),
            PACK_BLOCK=PACK_BLOCK,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def _some_none(tables: list[Pointers]) -> bool:
    return any(table.some_none for table in tables)


def _first_blocks(numels: tuple[int, ...]) -> list[int]:
    """Entries of ``packed_offsets`` before those of each tensor."""
    first = [0]
    for numel in numels:
        first.append(first[-1] + num_blocks(numel))
    return first
