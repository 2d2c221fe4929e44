"""The oracles against cases worked out by hand and against torch.optim.Adam in float64."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests import oracle
from tests.oracle import AdamOptions, AdamState


def test_pack_words_by_hand():
    bits = np.zeros(35, bool)
    bits[[0, 3, 31, 34]] = True
    expected = np.array([1 + 8 - 2**31, 4], np.int32)
    assert (oracle.pack_words(bits) == expected).all()
    assert (oracle.pack_words_fast(bits) == expected).all()
    assert oracle.pack_words(np.zeros(0, bool)).size == 0
    random = np.random.rand(1000) < 0.4
    assert (oracle.pack_words(random) == oracle.pack_words_fast(random)).all()


def test_select_by_hand():
    nan, inf = math.nan, math.inf
    tensors = [torch.tensor([1.0, -3.0, 0.0, nan]), torch.tensor([]), torch.tensor([[3.0, -2.0], [-0.0, -inf]])]
    chosen = oracle.select(tensors, 2)
    assert [m.tolist() for m in chosen.masks] == [[False, True, False, False], [], [False, False, False, True]]
    assert (chosen.threshold, chosen.count, chosen.nan_count) == (3.0, 2, 1)
    with_ties = oracle.select(tensors, 2, ties_all=True)
    assert with_ties.masks[2].tolist() == [True, False, False, True] and with_ties.count == 3
    everything = oracle.select(tensors, 100)
    assert everything.count == 5 and everything.threshold == 1.0
    nothing = oracle.select([torch.tensor([0.0, -0.0, nan])], 1)
    assert nothing.count == 0 and nothing.threshold == inf and nothing.nan_count == 1


def test_keep_at_least_by_hand():
    tensors = [torch.tensor([2.0, -2.0]), torch.tensor([2.0, 1.0, 5.0])]
    assert [m.tolist() for m in oracle.keep_at_least(tensors, 2.0).masks] == [[True, True], [True, False, True]]
    assert [m.tolist() for m in oracle.keep_at_least(tensors, 2.0, 1).masks] == [[True, False], [False, False, True]]


def test_exact_sum_by_hand():
    values = torch.tensor([2.0**-149, -1.0, 3.5, math.inf, math.nan, 2.0**127, -(2.0**-140)])
    assert oracle.exact_sum(values) == Fraction(9, 2) + 2**127 + Fraction(1 + 2**9, 2**149)
    assert oracle.exact_sum(torch.zeros(0)) == 0
    random = torch.randn(99)
    assert oracle.exact_sum(random) == sum(Fraction(abs(x)) for x in random.tolist())


def test_histogram_by_hand():
    # 1.0 has the key 0x3f800000, whose first 11 of 31 bits are 0x3f8; 1.5 has 0x3fc00000.
    tensors = [torch.tensor([1.0, -1.0, 0.0, math.nan]), torch.tensor([1.5])]
    level0 = oracle.histogram(tensors, 0, 0)
    assert level0[0x3F8] == 2 and level0[0x3FC] == 1 and level0.sum() == 3 and level0.size == 2048
    assert oracle.histogram(tensors, 0x3FC, 1)[0] == 1 and oracle.histogram(tensors, 0x3F8, 1)[0] == 2
    assert oracle.histogram(tensors, 0x3F8 << 10, 2)[0] == 2 and oracle.histogram(tensors, 1, 2).sum() == 0


def _state(x, n=None, **extra):
    x = np.array(x, np.float64)
    return AdamState(x, np.zeros_like(x), np.zeros(x.size, int), np.zeros_like(x), **extra)


def test_first_adam_step_moves_by_lr():
    after = oracle.adam_step(_state([1.0, 1.0]), np.array([4.0, -0.5]), None, None, False, AdamOptions(lr=0.1, eps=0.0))
    assert np.allclose(after.x, [0.9, 1.1], atol=1e-12)
    assert np.allclose(after.exp_avg, [0.4, -0.05]) and np.allclose(after.exp_avg_sq, [0.016, 0.00025])
    assert after.step.tolist() == [1, 1]


def test_masked_step_by_hand():
    state = _state([1.0, 1.0, 1.0])
    state.step[:] = [7, 0, 3]
    options = AdamOptions(lr=0.1, eps=0.0, weight_decay=0.5, decoupled_weight_decay=True)
    after = oracle.adam_step(state, np.array([1.0, 2.0, np.nan]), None, np.array([False, True, False]), False, options)
    # Entry 1 is touched first now: 1 * (1 - 0.1 * 0.5) - 0.1.
    assert np.allclose(after.x, [1.0, 0.85, 1.0], atol=1e-12)
    assert after.step.tolist() == [7, 1, 3] and after.exp_avg[[0, 2]].tolist() == [0, 0]


def test_order_of_a_joint_step_by_hand():
    options = AdamOptions(
        lr=0.1,
        beta1=0.0,
        eps=0.0,
        clip_value=3.0,
        maximize=True,
        retain_variance=True,
        grad_scale=2.0,
        weight_decay=1.0,
    )
    state = _state([1.0, 0.0])
    state.exp_avg = None
    mask = np.array([True, False])
    after = oracle.adam_step(state, np.array([2.0, 8.0]), np.array([6.0, np.nan]), mask, True, options)
    # Unscaled (1, 4) and (3, -); g = (4, 4), clipped (3, 3), negated (-3, -3), with decay (-2, -3);
    # p.grad's part h: (1, 4), clipped (1, 3), negated (-1, -3), with decay (0, -3).
    assert np.allclose(after.exp_avg_sq, [0.0, 0.001 * 9])
    assert after.x[0] == np.inf and np.isclose(after.x[1], 0.1)
    options.max_update = 0.5
    limited = oracle.adam_step(state, np.array([2.0, 8.0]), np.array([6.0, 0.0]), mask, True, options)
    assert np.allclose(limited.x, [1.05, 0.05])


def test_zeroed_nonfinite_and_amsgrad_by_hand():
    options = AdamOptions(lr=0.1, beta1=0.0, beta2=0.0, eps=0.0, zero_nonfinite=True)
    state = AdamState(np.zeros(2), np.zeros(2), np.zeros(2, int), None, np.array([1.0, 16.0]))
    after = oracle.adam_step(state, np.array([np.inf, 2.0]), None, None, False, options)
    assert after.exp_avg_sq.tolist() == [0.0, 4.0] and after.max_exp_avg_sq.tolist() == [1.0, 16.0]
    assert np.allclose(after.x, [0.0, -0.1 * 2 / 4])


def test_ema_and_nonfinite_by_hand():
    assert oracle.ema_step(np.array([1.0]), np.array([3.0]), 0.75)[0] == 1.5
    grad, forget = np.array([np.nan, 1.0, 1.0]), np.array([1.0, np.inf, np.inf])
    mask = np.array([False, True, False])
    assert oracle.nonfinite(grad, forget, mask, True, None) == 2
    assert oracle.nonfinite(grad, None, mask, False, None) == 0
    assert oracle.nonfinite(grad, None, None, False, None) == 1
    assert oracle.nonfinite(np.array([1e38], np.float32), None, None, False, 1e-3) == 1


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adam_oracle_is_torch_adam(decoupled, amsgrad, beta1):
    kwargs = {"lr": 0.05, "betas": (beta1, 0.99), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": amsgrad}
    param = torch.randn(50, dtype=torch.float64, requires_grad=True)
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)([param], maximize=True, **kwargs)
    zeros = np.zeros(50)
    state = AdamState(
        param.detach().numpy().copy(), zeros, np.zeros(50, int), zeros if beta1 else None, zeros if amsgrad else None
    )
    options = AdamOptions(0.05, beta1, 0.99, 1e-6, 0.1, decoupled_weight_decay=decoupled, maximize=True)
    for _ in range(6):
        param.grad = torch.randn(50, dtype=torch.float64)
        optimizer.step()
        state = oracle.adam_step(state, param.grad.numpy(), None, None, False, options)
    assert np.allclose(state.x, param.detach().numpy(), rtol=1e-12, atol=1e-13)
    assert np.allclose(state.exp_avg_sq, optimizer.state[param]["exp_avg_sq"].numpy(), rtol=1e-12)


def test_random_bits_by_hand():
    # MurmurHash3's finaliser has the known values 0 -> 0 and 1 -> 0x514e28b7.
    assert oracle._murmur_mix(0) == 0 and oracle._murmur_mix(1) == 0x514E28B7
    drawn = np.array([oracle.random_u32(7, 1, 0, entry) for entry in range(4000)], np.float64) / 2**32
    assert abs(drawn.mean() - 0.5) < 6 * math.sqrt(1 / 12 / 4000) and len(set(drawn)) > 3990
    negative, low_half = oracle.random_u32(-1, 1, 0, 5), oracle.random_u32(2**32 - 1, 1, 0, 5)
    assert negative == oracle.random_u32(2**64 - 1, 1, 0, 5) != low_half


def test_round_stochastic_by_hand():
    x = 1 + 2.0**-9  # bfloat16 neighbours 1 and 1 + 2^-7, a quarter of the way
    assert oracle.round_stochastic(x, torch.bfloat16, 0) == 1
    assert oracle.round_stochastic(x, torch.bfloat16, 0xBFFF) == 1
    assert oracle.round_stochastic(x, torch.bfloat16, 0xC000) == 1 + 2.0**-7
    assert oracle.round_stochastic(-x, torch.bfloat16, 0xFFFF) == -1 - 2.0**-7
    assert oracle.round_stochastic(2.0**-25, torch.float16, 0x1000) == 2.0**-24
    assert oracle.round_stochastic(2.0**-25, torch.float16, 0x0FFF) == 0
    assert oracle.round_stochastic(65519.0, torch.float16, 0x1FFF) == math.inf
    assert oracle.round_stochastic(0.5, torch.float16, 0x1FFF) == 0.5
