"""block_counts, pack, unpack and the bit layout of masks."""

import numpy as np
import pytest
import torch

from pecker_fast import ops
from tests import oracle
from tests.inputs import FLOATS, bits, random_masks, same_bits, scores, with_garbage_tails, word_offsets, words_of

BLOCK = 16384
SIZES = [0, 1, 31, 32, 33, 1023, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77]
PACKABLE = (*FLOATS, torch.float64, torch.int16, torch.int32)


def sizes(small: bool) -> list[int]:
    return [0, 1, 31, 32, 33, 1023, BLOCK + 1] if small else SIZES


def values(numel: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return scores("special", numel, torch.float32).to(dtype)
    return torch.randint(-30_000, 30_000, (numel,), dtype=dtype)


def test_layout_sizes():
    assert (ops.WORD_BITS, ops.PACK_BLOCK) == (32, BLOCK)
    assert [ops.num_words(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert [ops.num_blocks(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]
    assert ops.word_offsets([33, 0, 1]) == [0, 2, 2, 3]


@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1023, 70_001])
def test_pack_bits_and_unpack_bits(numel):
    for density in (0.0, 0.3, 1.0):
        chosen = np.random.rand(numel) < density
        words = ops.pack_bits(torch.from_numpy(chosen))
        assert words.dtype == torch.int32 and (words.numpy() == oracle.pack_words_fast(chosen)).all()
        assert (ops.unpack_bits(words, numel).numpy() == chosen).all()


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_block_counts(density, backend, device, small):
    numels = sizes(small)
    masks = random_masks(numels, density)
    words = with_garbage_tails(words_of(masks), numels).to(device)
    counts = ops.block_counts(words, word_offsets(numels), numels, backend=backend)
    expected = [mask[start : start + BLOCK].sum() for mask in masks for start in range(0, mask.size, BLOCK)]
    assert counts.dtype == torch.int64 and counts.tolist() == expected


def test_block_counts_of_any_offsets(backend, device):
    # The words of some tensors of a larger mask, in another order.
    masks = random_masks([100, 64, 33])
    words, offsets = words_of(masks, device), word_offsets([100, 64, 33])
    counts = ops.block_counts(words, [offsets[2], offsets[0]], [33, 100], backend=backend)
    assert counts.tolist() == [masks[2].sum(), masks[0].sum()]
    assert ops.block_counts(words, [], [], backend=backend).shape == (0,)


@pytest.mark.parametrize("dtype", PACKABLE)
def test_pack_and_unpack(dtype, backend, device, small):
    for numel in sizes(small):
        for density in (0.0, float(np.random.rand()), 1.0):
            mask = np.random.rand(numel) < density
            dense = values(numel, dtype)
            words = with_garbage_tails(words_of([mask]), [numel]).to(device)
            chosen = torch.from_numpy(mask)
            packed = ops.pack(dense.to(device), words, int(mask.sum()), backend=backend)
            assert same_bits(packed.cpu(), dense[chosen])
            restored = ops.unpack(packed, words, numel, backend=backend)
            # On the bits: assigning a single NaN by a mask would go through a Python number and lose its payload.
            expected = torch.zeros_like(bits(dense))
            expected[chosen] = bits(dense)[chosen]
            assert restored.dtype == dtype and torch.equal(bits(restored.cpu()), expected)


def test_pack_takes_any_shape(backend, device):
    dense = torch.randn(5, 13, 3)
    mask = np.random.rand(195) < 0.5
    packed = ops.pack(dense.to(device), words_of([mask], device), int(mask.sum()), backend=backend)
    assert same_bits(packed.cpu(), dense.view(-1)[torch.from_numpy(mask)])
