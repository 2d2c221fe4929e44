"""MaskedAdam's masked and joint steps against a float64 oracle that keeps a step count for every entry."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import pecker_fast as pf
from tests.inputs import same_bits
from tests.optim_oracle import OracleOptimizer, make_grads, make_params, set_grads
from tests.oracle import AdamOptions


def random_mask(params, density: float = 0.4) -> pf.SaliencyMask:
    return pf.SaliencyMask.from_bool([torch.rand(p.shape) < density for p in params])


def build(params, options: AdamOptions, backend=None, **extra) -> pf.MaskedAdam:
    return pf.MaskedAdam(
        params,
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        decoupled_weight_decay=options.decoupled_weight_decay,
        maximize=options.maximize,
        clip_value=options.clip_value,
        max_update=options.max_update,
        ema_decay=options.ema_decay,
        variance="retain" if options.retain_variance else "combined",
        nonfinite="zero" if options.zero_nonfinite else "propagate",
        backend=backend,
        **extra,
    )


def random_options() -> AdamOptions:
    maybe = lambda value, otherwise=None: value if np.random.rand() < 0.4 else otherwise  # noqa: E731
    return AdamOptions(
        lr=0.01,
        beta1=float(np.random.choice([0.0, 0.9])),
        beta2=float(np.random.choice([0.9, 0.999])),
        eps=1e-8,
        weight_decay=maybe(0.1, 0.0),
        decoupled_weight_decay=maybe(True, False),
        maximize=maybe(True, False),
        clip_value=maybe(0.7),
        max_update=maybe(0.8),
        ema_decay=maybe(0.8),
    )


class Twin:
    """An optimizer and its oracle, stepped together."""

    def __init__(self, options: AdamOptions, backend=None, packed: bool = False, amsgrad: bool = False) -> None:
        self.params = make_params()
        self.options = options
        self.optimizer = build(self.params, options, backend, packed=packed, amsgrad=amsgrad)
        self.oracle = OracleOptimizer(self.params, options, packed=packed, amsgrad=amsgrad)

    def step(self, mask=None, joint: bool = False, missing: float = 0.0, grads=None) -> None:
        grads = make_grads(self.params, missing) if grads is None else grads
        forget = make_grads(self.params, missing) if joint else None
        set_grads(self.params, grads)
        self.optimizer.step(mask=mask, masked_grads=forget)
        retain = self.options.retain_variance
        self.options.retain_variance = retain and joint
        self.oracle.step(grads, mask, forget)
        self.options.retain_variance = retain

    def check(self) -> None:
        ema = self.optimizer.ema_parameters() if self.options.ema_decay is not None else None
        self.oracle.check(self.params, ema)


@pytest.mark.parametrize("sequence", ["plain", "masked", "joint", "mixed"])
def test_sequences_of_steps(sequence, backend, small):
    for _ in range(1 if small else 6):
        options = random_options()
        options.retain_variance = bool(np.random.rand() < 0.5)
        twin = Twin(options, backend, amsgrad=bool(np.random.rand() < 0.3))
        masks = [random_mask(twin.params) for _ in range(3)]
        for _ in range(4 if small else 10):
            kind = sequence if sequence != "mixed" else np.random.choice(["plain", "masked", "joint"])
            mask = None if kind == "plain" else masks[np.random.randint(3) if sequence == "mixed" else 0]
            if kind == "joint" and np.random.rand() < 0.3:
                mask = None
            twin.step(mask, kind == "joint", missing=0.2)
            twin.check()


@pytest.mark.parametrize("first", ["plain", "masked", "joint"])
@pytest.mark.parametrize("then", ["plain", "masked", "joint", "other_mask"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_each_change_of_regime(first, then, beta1):
    twin = Twin(AdamOptions(lr=0.01, beta1=beta1, beta2=0.99, ema_decay=0.9))
    one, other = random_mask(twin.params), random_mask(twin.params)
    for kind in [first] * 3 + [then] * 2 + [first]:
        mask = {"plain": None, "other_mask": other}.get(kind, one)
        twin.step(mask, kind == "joint")
        twin.check()


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_packed_repacks_when_the_mask_changes(beta1, backend, small):
    for _ in range(1 if small else 4):
        options = random_options()
        options.beta1 = beta1
        twin = Twin(options, backend, packed=True, amsgrad=bool(np.random.rand() < 0.4))
        masks = [random_mask(twin.params, density) for density in (0.5, 0.1, 0.9, 0.0, 1.0)]
        for index in (0, 0, 1, 1, 0, 2, 3, 4, 0)[: 6 if small else 9]:
            twin.step(masks[index])
            twin.check()
            for param in twin.params:
                state = twin.optimizer.state[param]
                salient = int(masks[index][position(twin.params, param)].sum())
                assert state["exp_avg_sq"].shape == (salient,) and ("exp_avg" in state) == (beta1 != 0)


def position(params, param) -> int:
    return next(i for i, p in enumerate(params) if p is param)


def test_packed_equals_dense_with_one_mask(backend, small):
    options = random_options()
    params = [nn.Parameter(torch.randn(300)), nn.Parameter(torch.randn(5, 7))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    mask = random_mask(params)
    dense, packed = build(params, options, backend), build(twins, options, backend, packed=True)
    for _ in range(3):
        grads = make_grads(params)
        for these, optimizer in ((params, dense), (twins, packed)):
            set_grads(these, [g.clone() for g in grads])
            optimizer.step(mask=mask)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(params, twins, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_many_densities_in_one_tensor(packed, backend, small):
    """Sparse, dense, empty and short chunks in every order, each with its own code path."""
    chunk = 16384
    sizes = [900, 33] if small else [9 * chunk + 77, 5, 3 * chunk]
    options = random_options()
    reference = [nn.Parameter(torch.randn(n)) for n in sizes]
    params = [nn.Parameter(p.detach().clone()) for p in reference]
    start = [p.detach().clone() for p in params]
    masks = []
    for n in sizes:
        densities = torch.tensor(np.random.choice([0.0, 0.001, 0.01, 0.03, 0.05, 0.5, 1.0], n // chunk + 1))
        masks.append(torch.rand(n) < densities.repeat_interleave(chunk)[:n])
    mask = pf.SaliencyMask.from_bool(masks)
    twins = (
        (reference, build(reference, options, "reference", packed=packed)),
        (params, build(params, options, backend, packed=packed)),
    )
    for _ in range(3):
        grads = make_grads(params)
        for these, optimizer in twins:
            set_grads(these, [g.clone() for g in grads])
            optimizer.step(mask=mask)
    for param, expected, salient, before in zip(params, reference, masks, start, strict=True):
        assert torch.equal(param[~salient], before[~salient])
        assert torch.allclose(param, expected, rtol=1e-5, atol=1e-7)


def test_packed_accepts_masked_steps_only():
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = pf.MaskedAdam(params, packed=True)
    set_grads(params, make_grads(params))
    for arguments in ({}, {"masked_grads": make_grads(params)}):
        with pytest.raises(ValueError, match="packed"):
            optimizer.step(**arguments)
    with pytest.raises(ValueError, match="packed"):
        optimizer.step(mask=random_mask(params), masked_grads=make_grads(params))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True)) and not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_entries_stay_bit_for_bit(dtype, backend):
    params = make_params(dtype)
    optimizer = pf.MaskedAdam(params, lr=0.1, weight_decay=0.1, amsgrad=True, ema_decay=0.5, backend=backend)
    set_grads(params, make_grads(params))
    optimizer.step()
    mask = random_mask(params)
    for _ in range(2):
        saved = [[t.detach().clone() for t in tensors(optimizer, p)] for p in params]
        grads = make_grads(params)
        for i, grad in enumerate(grads):
            grad[~mask[i]] = math.nan
        set_grads(params, grads)
        optimizer.step(mask=mask)
        for i, param in enumerate(params):
            for before, after in zip(saved[i], tensors(optimizer, param), strict=False):
                assert same_bits(after.detach()[~mask[i]], before[~mask[i]])
            assert param.isfinite().all()
            # A single entry may have an update below half a unit of its last place.
            assert mask[i].sum() < 10 or not torch.equal(param, saved[i][0])


def tensors(optimizer, param) -> list[torch.Tensor]:
    state = optimizer.state[param]
    return [param, state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"]]


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_late_touched_entries_move_at_most_lr(beta1, backend):
    for packed in (False, True):
        param = nn.Parameter(torch.zeros(256))
        optimizer = pf.MaskedAdam([param], lr=0.01, betas=(beta1, 0.999), packed=packed, backend=backend)
        early = pf.SaliencyMask.from_bool([torch.arange(256) < 128])
        late = pf.SaliencyMask.from_bool([torch.arange(256) >= 64])
        for _ in range(30):
            param.grad = torch.randn(256)
            optimizer.step(mask=early)
        before = param.detach().clone()
        assert not before[128:].any()
        param.grad = torch.randn(256)
        param.grad += 0.1 * param.grad.sign()
        optimizer.step(mask=late)
        moved = (param.detach() - before).abs()
        # An entry's first step is lr |g| / (|g| + eps), in fewer than 16 operations that round to float32.
        rounding, smallest, eps = 16 * 2**-24, 0.1, optimizer.defaults["eps"]
        assert (moved[128:] <= 0.01 * (1 + rounding)).all()
        assert (moved[128:] >= 0.01 * (1 - rounding) * smallest / (smallest + eps)).all()
        assert not moved[:64].any()


def test_plain_step_after_masked_ones_moves_untouched_entries_by_lr():
    param = nn.Parameter(torch.zeros(200))
    optimizer = pf.MaskedAdam([param], lr=0.01, betas=(0.0, 0.999))
    mask = pf.SaliencyMask.from_bool([torch.arange(200) < 100])
    for _ in range(20):
        param.grad = torch.randn(200)
        optimizer.step(mask=mask)
    param.grad = torch.randn(200)
    optimizer.step()
    assert torch.allclose(param.detach()[100:].abs(), torch.tensor(0.01), rtol=1e-3)


def test_joint_step_is_the_sum_and_selected_not_multiplied():
    params = make_params()
    mask = random_mask(params)
    grads, forget = make_grads(params), make_grads(params)
    other = [nn.Parameter(p.detach().clone()) for p in params]
    for i, grad in enumerate(forget):
        other[i].grad = grads[i] + torch.where(mask[i], grad, 0)
        grad[~mask[i]] = math.nan
    set_grads(params, grads)
    pf.MaskedAdam(params, lr=0.1).step(mask=mask, masked_grads=forget)
    torch.optim.Adam(other, lr=0.1).step()
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(params, other, strict=True))


def test_missing_gradient_counts_as_zero_beside_the_other():
    one, two, three = (nn.Parameter(torch.randn(40, dtype=torch.float64)) for _ in range(3))
    start = [p.detach().clone() for p in (one, two, three)]
    optimizer = pf.MaskedAdam([one, two, three], lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
    mask = random_mask([one, two, three])
    one.grad = torch.randn(40, dtype=torch.float64)
    forget = [None, torch.randn(40, dtype=torch.float64), None]
    optimizer.step(mask=mask, masked_grads=forget)
    oracle = OracleOptimizer(start[:2], AdamOptions(0.01, weight_decay=0.1, decoupled_weight_decay=True))
    oracle.step([one.grad, None], mask, [torch.zeros(40), forget[1]])
    oracle.check([one, two])
    assert torch.equal(three, start[2]) and "step" not in optimizer.state[three]


def test_ema_advances_without_a_gradient():
    twin = Twin(AdamOptions(lr=0.1, ema_decay=0.5))
    twin.step()
    grads = make_grads(twin.params)
    for _ in range(2):
        twin.step(grads=[None, *grads[1:]])
        twin.check()


def test_empty_step_changes_nothing():
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = pf.MaskedAdam(params, weight_decay=0.1)
    optimizer.step()
    optimizer.step(mask=random_mask(params))
    optimizer.step(masked_grads=[None] * len(params))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert not any("step" in optimizer.state[p] for p in params)


# ---- EMA


def test_ema_starts_at_the_parameters_and_swaps_bit_for_bit():
    params = make_params(torch.bfloat16)
    optimizer = pf.MaskedAdam(params, lr=0.1, ema_decay=0.9)
    emas = optimizer.ema_parameters()
    assert all(e.dtype == torch.float32 and torch.equal(e, p.float()) for e, p in zip(emas, params, strict=True))
    for _ in range(3):
        set_grads(params, make_grads(params))
        optimizer.step()
    own = [p.detach().clone() for p in params]
    with pytest.raises(KeyError, match="stop"), optimizer.swapped_ema():
        for param, ema in zip(params, optimizer.ema_parameters(), strict=True):
            assert torch.equal(param, ema.to(param.dtype))
        with pytest.raises(RuntimeError, match="swapped_ema"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="swapped_ema"), optimizer.swapped_ema():
            pass
        raise KeyError("stop")
    assert all(same_bits(a.detach(), b) for a, b in zip(params, own, strict=True))
    optimizer.step()


def test_ema_after_parameters_were_changed_from_outside():
    # The EMA of frozen entries no longer equals the parameter, so it must be updated.
    twin = Twin(AdamOptions(lr=0.01, ema_decay=0.9))
    mask = random_mask(twin.params)
    for _ in range(3):
        twin.step(mask)
    with torch.no_grad():
        for param, state in zip(twin.params, twin.oracle.states, strict=True):
            param.mul_(2.0)
            state.x = state.x * 2.0
    for _ in range(3):
        twin.step(mask)
        twin.check()


def test_ema_is_opt_in():
    optimizer = pf.MaskedAdam(make_params())
    with pytest.raises(RuntimeError, match="ema_decay"):
        optimizer.ema_parameters()
    with pytest.raises(RuntimeError, match="ema_decay"), optimizer.swapped_ema():
        pass


# ---- bookkeeping


def test_sparsity_stats():
    params = [nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(60))]
    optimizer = pf.MaskedAdam([("a", params[0]), ("b", params[1])])
    masks = [
        pf.SaliencyMask.from_bool([torch.arange(100) < 50, torch.arange(60) < 0]),
        pf.SaliencyMask.from_bool([torch.arange(100) >= 25, torch.arange(60) < 30]),
    ]
    for mask in (masks[0], masks[0], masks[1]):
        set_grads(params, make_grads(params))
        optimizer.step(mask=mask)
    stats = optimizer.sparsity_stats()
    a, b = stats["tensors"]["a"], stats["tensors"]["b"]
    assert (a["touched_last"], a["touched_ever"], a["mean_update_count"]) == (0.75, 1.0, 1.75)
    assert (b["touched_last"], b["touched_ever"], b["mean_update_count"]) == (0.5, 0.5, 0.5)
    assert stats["touched_last"] == pytest.approx((75 + 30) / 160)
    assert stats["touched_ever"] == pytest.approx((100 + 30) / 160)
    assert stats["mean_update_count"] == pytest.approx((175 + 30) / 160)
    assert stats["mask_iou"] == masks[0].iou(masks[1]) == pytest.approx(25 / 130)
    assert stats["mask_density"] == masks[1].density


def test_sparsity_stats_of_each_regime():
    param = nn.Parameter(torch.zeros(100))
    mask = pf.SaliencyMask.from_bool([torch.arange(100) < 20])
    for packed in (False, True):
        optimizer = pf.MaskedAdam([param], packed=packed)
        assert optimizer.sparsity_stats()["touched_ever"] == 0.0 and optimizer.sparsity_stats()["mask_iou"] is None
        for _ in range(4):
            param.grad = torch.randn(100)
            optimizer.step(mask=mask)
        stats = optimizer.sparsity_stats()
        result = (stats["touched_last"], stats["touched_ever"], stats["mean_update_count"])
        assert result == pytest.approx((0.2, 0.2, 0.8))
    optimizer = pf.MaskedAdam([param])
    optimizer.step()
    stats = optimizer.sparsity_stats()
    assert (stats["touched_last"], stats["touched_ever"], stats["mean_update_count"]) == (1.0, 1.0, 1.0)
