"""The CUDA kernels, run on the host by the emulator, against the reference: no GPU is needed."""

import random

import pytest
import torch

from pecker_fast.ops import reference
from pecker_fast.ops.layout import num_words, word_offsets

from .emulation import library, streaming
from .emulation.case import (
    DTYPES,
    SCORE_DTYPES,
    Memory,
    assert_all_same,
    make_mask,
    set_random_order,
    sizes,
    some_missing,
    spoil,
    values,
)

pytestmark = library.needs_compiler


@pytest.fixture(autouse=True)
def order():
    set_random_order()


@pytest.mark.parametrize("reduce", ["sum", "abs_sum", "sq_sum"])
def test_accumulate(reduce):
    memory = Memory()
    numels = sizes()
    grads = [spoil(values(n, random.choice(SCORE_DTYPES))) for n in numels]
    sums = [values(g.numel(), torch.float32) for g in grads]
    expected = [s.clone() for s in sums]
    sums = [memory.place(s, random.choice((0, 0, 1, 2, 3))) for s in sums]
    reference.accumulate_(expected, grads, reduce)
    streaming.accumulate_(sums, [memory.place(g, random.choice((0, 0, 1, 3))) for g in grads], reduce)
    memory.check()
    assert_all_same(sums, expected, "accumulators")


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_apply_mask(density):
    memory = Memory()
    numels = sizes()
    words, offsets, _ = make_mask(numels, density)
    tensors = [spoil(values(n, random.choice(DTYPES))) for n in numels]
    expected = [t.clone() for t in tensors]
    tensors = [memory.place(t, random.choice((0, 0, 1, 2, 3))) for t in tensors]
    reference.apply_mask_(expected, words, offsets)
    streaming.apply_mask_(tensors, words, offsets)
    memory.check()
    assert_all_same(tensors, expected, "tensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "masked", "joint", "joint without mask"])
def test_count_nonfinite(kind, dtype):
    memory = Memory()
    numels = sizes()
    grads = some_missing([spoil(values(n, dtype, 1e4)) for n in numels])
    masked_grads = some_missing([spoil(values(n, dtype, 1e4)) for n in numels]) if "joint" in kind else []
    words, offsets = make_mask(numels, random.random())[:2] if kind in ("masked", "joint") else (None, [])
    scale = random.choice((None, torch.tensor(1e-37), torch.tensor(1024.0)))
    expected = reference.count_nonfinite(grads, masked_grads, words, offsets, scale)
    grads = [memory.place(g, random.choice((0, 0, 1, 2, 3))) for g in grads]
    masked_grads = [memory.place(g, random.choice((0, 0, 1, 2, 3))) for g in masked_grads]
    assert streaming.count_nonfinite(grads, masked_grads, words, offsets, scale) == expected


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_block_counts(density):
    numels = sizes(large=3)
    words, offsets, _ = make_mask(numels, density)
    expected = reference.block_counts(words, offsets, numels)
    assert torch.equal(streaming.block_counts(words, offsets, numels), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_pack_and_unpack(dtype, density):
    for numel in (0, random.randint(1, 200), 16384 * 2 + random.randint(-3, 3)):
        words, (offset,), (mask,) = make_mask([numel], density)
        words = words[offset:]
        integers = torch.randint(-30000, 30000, (numel,))
        dense = Memory().place(integers.to(dtype), random.choice((0, 0, 1, 3)))
        count = int(mask.sum())
        packed = streaming.pack(dense, words, count)
        assert torch.equal(packed, reference.pack(dense, words, count))
        assert torch.equal(streaming.unpack(packed, words, numel), reference.unpack(packed, words, numel))


def test_pack_with_a_wrong_count():
    numel = 20000
    words, (offset,), (mask,) = make_mask([numel], 0.3)
    dense, count = torch.arange(1.0, numel + 1), int(mask.sum())
    for requested in (0, count - 7, count + 7):
        packed = streaming.pack(dense, words[offset:], requested)
        expected = torch.zeros(requested)
        expected[: min(requested, count)] = dense[mask][:requested]
        assert torch.equal(packed, expected)


def test_more_chunks_of_tables_than_one_upload():
    numels = [random.randint(1, 3) for _ in range(900)]
    tensors = [values(n, torch.float32) for n in numels]
    grads = [values(n, torch.float32) for n in numels]
    expected = [t + g for t, g in zip(tensors, grads, strict=True)]
    streaming.accumulate_(tensors, grads, "sum")
    assert_all_same(tensors, expected, "accumulators")


def test_word_offsets_helper_agrees_with_the_layout():
    numels = sizes()
    words, offsets, _ = make_mask(numels, 0.5)
    assert words.numel() >= word_offsets(numels)[-1]
    assert all(b - a >= num_words(n) for a, b, n in zip(offsets, offsets[1:], numels, strict=False))
