"""apply_mask_, accumulate_ and count_nonfinite."""

import math

import numpy as np
import pytest
import torch

from pecker_fast import ops
from tests import oracle
from tests.inputs import FLOATS, random_masks, same_bits, scores, with_garbage_tails, word_offsets, words_of

DTYPES = (*FLOATS, torch.float64)
SIZES = [1023, 0, 1, 31, 32, 33, 2500]


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_apply_mask(density, backend, device, small):
    numels = [*SIZES, 3000 if small else 100_003]
    for _ in range(1 if small else 3):
        tensors = [scores("special", n).to(DTYPES[i % 4]) for i, n in enumerate(numels)]
        masks = random_masks(numels, density)
        words = with_garbage_tails(words_of(masks), numels).to(device)
        changed = [t.to(device).clone() for t in tensors]
        ops.apply_mask_(changed, words, word_offsets(numels), backend=backend)
        for before, after, mask in zip(tensors, changed, masks, strict=True):
            expected = before.clone()
            expected[torch.from_numpy(~mask)] = 0.0
            assert same_bits(after.cpu(), expected)


def test_apply_mask_to_some_tensors_in_another_order(backend, device):
    numels = [100, 64, 33]
    masks = random_masks(numels)
    offsets = word_offsets(numels)
    tensors = [torch.randn(33, device=device), torch.randn(10, 10, device=device)]
    expected = [t.cpu().view(-1) * torch.from_numpy(m) for t, m in zip(tensors, (masks[2], masks[0]), strict=True)]
    ops.apply_mask_(tensors, words_of(masks, device), [offsets[2], offsets[0]], backend=backend)
    assert all(torch.equal(t.cpu().view(-1), e) for t, e in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("reduce", ["sum", "abs_sum", "sq_sum"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_accumulate(dtype, reduce, backend, device, small):
    numels = [*SIZES, 3000 if small else 100_003]
    before = [torch.randn(n) for n in numels]
    grads = [torch.randn(n).to(dtype) for n in numels]
    after = [t.to(device).clone() for t in before]
    moved = [g.to(device) for g in grads]
    ops.accumulate_(after, moved, reduce, backend=backend)
    for old, new, grad, source in zip(before, after, grads, moved, strict=True):
        assert same_bits(source.cpu(), grad)
        term = {"sum": grad.double(), "abs_sum": grad.double().abs(), "sq_sum": grad.double() ** 2}[reduce]
        exact = old.double() + term
        # One rounding of the square and one of the sum.
        size = old.double().abs() + exact.abs()
        assert ((new.cpu().double() - exact).abs() <= torch.finfo(torch.float32).eps * size).all()
        if reduce != "sq_sum":
            assert same_bits(new.cpu(), exact.float())


def test_accumulate_passes_nan_and_inf_on(backend, device):
    for reduce in ("sum", "abs_sum", "sq_sum"):
        accumulator = torch.zeros(5, device=device)
        grad = torch.tensor([math.nan, -math.inf, 1e30, -0.0, -2.0], device=device)
        ops.accumulate_([accumulator], [grad], reduce, backend=backend)
        values = accumulator.tolist()
        assert math.isnan(values[0]) and values[1] == (-math.inf if reduce == "sum" else math.inf)
        assert values[2] == (math.inf if reduce == "sq_sum" else torch.tensor(1e30).item())
        assert values[3:] == [0.0, {"sum": -2.0, "abs_sum": 2.0, "sq_sum": 4.0}[reduce]]


@pytest.mark.parametrize("kind", ["plain", "masked", "joint", "joint_everywhere"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_count_nonfinite(dtype, kind, backend, device, small):
    numels = SIZES if small else [*SIZES, 50_001]
    joint = kind.startswith("joint")
    for scale in (None, 2.0**-3):

        def gradients():
            made = [scores("special", n).to(dtype) for n in numels]
            return [None if np.random.rand() < 0.2 else g for g in made]

        grads, forget = gradients(), gradients() if joint else []
        grads[0] = torch.randn(numels[0]).to(dtype) if grads[0] is None else grads[0]
        masks = random_masks(numels) if kind in ("masked", "joint") else None
        words = None if masks is None else with_garbage_tails(words_of(masks), numels).to(device)
        move = lambda tensors: [None if t is None else t.to(device) for t in tensors]  # noqa: E731
        count = ops.count_nonfinite(
            move(grads),
            move(forget),
            words,
            [] if words is None else word_offsets(numels),
            None if scale is None else torch.tensor(scale, device=device),
            backend=backend,
        )
        array = lambda t: None if t is None else oracle.to_numpy(t)  # noqa: E731
        expected = sum(
            oracle.nonfinite(array(g), array(forget[i]) if joint else None, masks[i] if masks else None, joint, scale)
            for i, g in enumerate(grads)
        )
        assert count.dtype == torch.int64 and count.shape == () and count.item() == expected


def test_count_nonfinite_after_unscaling(backend, device):
    # Finite before the division by the scale, infinite after it; and the sum of two finite ones.
    tiny = torch.tensor(2.0**-100, device=device)
    grad = torch.tensor([1.0, 1e20, -3e38], device=device)
    assert ops.count_nonfinite([grad], [], None, [], tiny, backend=backend).item() == 2
    assert ops.count_nonfinite([grad], [grad], None, [], None, backend=backend).item() == 1
