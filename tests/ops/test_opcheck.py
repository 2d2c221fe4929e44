"""The operators under torch's own checks of schema, mutation marks, fakes and tracing; and inside torch.compile."""

import numpy as np
import pytest
import torch

from pecker_fast import ops
from pecker_fast.ops.reference import pack_bits
from pecker_fast.ops.schemas import SCHEMAS, op_overload
from tests.inputs import random_masks, same_bits, word_offsets, words_of


def offsets_of_blocks(masks: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.concatenate([[0], np.cumsum(m)])[:-1:16384] for m in masks]))


def adam_sample(**features) -> tuple[tuple, dict]:
    numels = [40, 17]
    dtype = features.pop("dtype", torch.float32)
    kind = features.pop("kind", "plain")
    beta1 = features.pop("beta1", 0.9)
    masks = random_masks(numels)
    zeros = lambda: [torch.zeros(n) for n in numels]  # noqa: E731
    randn = lambda: [torch.randn(n).to(dtype) for n in numels]  # noqa: E731
    packed = features.pop("packed", False)
    state = lambda: [torch.zeros(int(m.sum())) for m in masks] if packed else zeros()  # noqa: E731
    counts = features.pop("counts", False)
    args = (
        [torch.randn(n).to(dtype) for n in numels],
        [randn()[0], None] if kind == "joint" else randn(),
        randn() if kind == "joint" else [],
        state() if beta1 else [],
        state(),
        state() if features.pop("amsgrad", False) else [],
        zeros() if features.pop("masters", False) else [],
        zeros() if "ema_decay" in features else [],
        [t.to(torch.int16) for t in state()] if counts else [],
        torch.ones(2),
        torch.tensor(1e-3, dtype=torch.float64),
        ops.bias_table(beta1, 0.9, torch.float32, torch.device("cpu")) if counts else None,
        None if kind == "plain" else words_of(masks),
        [] if kind == "plain" else word_offsets(numels),
        offsets_of_blocks(masks) if packed else None,
        torch.tensor(2.0) if features.pop("scaled", False) else None,
        torch.tensor(0.0) if features.pop("found_inf", False) else None,
    )
    return args, {"beta1": beta1, "beta2": 0.9, "eps": 1e-8, **features}


def samples(name: str) -> list[tuple[tuple, dict]]:
    numels = [40, 0, 17]
    mixed = [torch.randn(40), torch.randn(0).half(), torch.randn(17).bfloat16()]
    others, damping = [torch.randn_like(t) for t in mixed], torch.rand(3)
    masks = random_masks(numels)
    words, offsets = words_of(masks), word_offsets(numels)
    dense = torch.randn(70)
    dense_mask = np.random.rand(70) < 0.5
    count = int(dense_mask.sum())
    prefixes = torch.tensor([1, 2], dtype=torch.int32)
    return {
        "radix_histogram": [((mixed, prefixes, level), {}) for level in range(3)]
        + [((mixed, prefixes, 0, others, damping), {})],
        "threshold_mask": [
            ((mixed, torch.tensor([1 << 29, 1], dtype=torch.int32), torch.tensor([1, 5]), *relative), {})
            for relative in ((), (others, damping))
        ],
        "select": [((mixed, torch.tensor([1, 20]), ties), {}) for ties in (False, True)]
        + [(([], torch.tensor([1])), {}), ((mixed, torch.tensor([1, 20]), False, others, damping), {})],
        "magnitude_sums": [((mixed,), {})],
        "block_counts": [((words, offsets, numels), {})],
        "pack": [((dense.to(t), words_of([dense_mask]), count), {}) for t in (torch.float32, torch.int16)],
        "unpack": [((torch.randn(count), words_of([dense_mask]), 70), {})],
        "apply_mask_": [((mixed, words, offsets), {})],
        "accumulate_": [(([torch.zeros(n) for n in numels], mixed, r), {}) for r in ("sum", "abs_sum", "sq_sum")],
        "count_nonfinite": [
            (([torch.randn(40), None], [], None, []), {}),
            (([torch.randn(40), None], [None, torch.randn(17)], words, [0, 2], torch.tensor(2.0)), {}),
        ],
        "masked_adam_": [
            adam_sample(),
            adam_sample(kind="masked", packed=True, counts=True, amsgrad=True, weight_decay=0.1, found_inf=True),
            adam_sample(kind="joint", dtype=torch.bfloat16, masters=True, retain_variance=True, ema_decay=0.9),
            adam_sample(kind="masked", beta1=0.0, clip_value=1.0, max_update=1.0, scaled=True, ema_decay=0.9),
            adam_sample(dtype=torch.float16, stochastic_rounding=True, seed=3, zero_nonfinite=True, maximize=True),
        ],
    }[name]


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_opcheck(name):
    for args, kwargs in samples(name):
        torch.library.opcheck(op_overload(name), args, kwargs)


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_fakes_have_the_shapes_of_the_results(name):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_leaves, tree_map

    for args, kwargs in samples(name):
        real = [t for t in tree_leaves(op_overload(name)(*args, **kwargs)) if t is not None]
        with FakeTensorMode() as mode:
            fake_args = tree_map(lambda t, mode=mode: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t, args)
            fake = [t for t in tree_leaves(op_overload(name)(*fake_args, **kwargs)) if t is not None]
        assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


def select_and_apply(scores, ks):
    words, thresholds, _, _ = ops.select([s * 2 for s in scores], ks)
    ops.apply_mask_(scores, words[0], [0, 2])
    return thresholds + 1


def accumulate_and_step(params, grads, squares, accumulators):
    ops.accumulate_(accumulators, grads, "abs_sum")
    ops.masked_adam_(
        params, [g * 2 for g in grads], [], [], squares, [], [], [], [], torch.ones(2),
        torch.tensor(1e-2, dtype=torch.float64), None, None, [], None, None, None, beta1=0.0, beta2=0.9, eps=1e-8,
    )  # fmt: skip
    return params[0] + 1


def pack_and_unpack(dense, words):
    packed = ops.pack(dense, words, 20)
    return ops.unpack(packed + 1, words, 64), ops.block_counts(words, [0], [64])


def compiled_inputs(function) -> list:
    if function is select_and_apply:
        return [[torch.randn(40), torch.randn(17)], torch.tensor([20])]
    if function is accumulate_and_step:
        return [[torch.randn(n) for n in (40, 17)] for _ in range(2)] + [
            [torch.zeros(n) for n in (40, 17)] for _ in range(2)
        ]
    mask = torch.zeros(64, dtype=torch.bool)
    mask[torch.randperm(64)[:20]] = True
    return [torch.randn(64), pack_bits(mask)]


@pytest.mark.parametrize("function", [select_and_apply, accumulate_and_step, pack_and_unpack])
def test_compiles_without_graph_breaks(function):
    from torch.utils._pytree import tree_leaves, tree_map

    inputs = compiled_inputs(function)
    copies = tree_map(torch.clone, inputs)
    expected = function(*inputs)
    torch.compiler.reset()
    result = torch.compile(function, fullgraph=True, backend="aot_eager")(*copies)
    assert all(same_bits(a, b) for a, b in zip(tree_leaves(result), tree_leaves(expected), strict=True))
    assert all(same_bits(a, b) for a, b in zip(tree_leaves(copies), tree_leaves(inputs), strict=True)), (
        "mutations differ"
    )
