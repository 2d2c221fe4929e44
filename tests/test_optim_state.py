"""MaskedAdam's state: round trips, low precision, loss scaling, non-finite gradients."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import pecker_fast as pf
from tests import oracle
from tests.inputs import same_bits
from tests.optim_oracle import make_grads, make_params, set_grads
from tests.test_optim import random_mask

KINDS = {
    "plain": {},
    "beta1_0": {"betas": (0.0, 0.99)},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "ema": {"ema_decay": 0.9},
    "bfloat16": {"ema_decay": 0.9},
    "masters": {"master_weights": True},
    "rounding": {"stochastic_rounding": True, "seed": 5},
    "packed": {"packed": True, "amsgrad": True, "ema_decay": 0.9},
    "packed_beta1_0": {"packed": True, "betas": (0.0, 0.99)},
    "packed_masters": {"packed": True, "master_weights": True, "ema_decay": 0.9},
    "one_mask": {"ema_decay": 0.9},
    "counts": {"ema_decay": 0.9},
}
MASKED = ("packed", "packed_beta1_0", "packed_masters", "one_mask", "counts")


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind in ("bfloat16", "masters", "rounding", "packed_masters") else torch.float32


def masks_of(kind: str, params) -> list[pf.SaliencyMask | None]:
    """The mask of each step: two steps with the first, then the others."""
    if kind not in MASKED:
        return [None] * 4
    first, second = random_mask(params), random_mask(params)
    return [first] * 4 if kind == "one_mask" else [first, first, second, second]


def steps(params, optimizer, masks, grads) -> None:
    for mask, these in zip(masks, grads, strict=True):
        set_grads(params, these)
        optimizer.step(mask=mask)


def round_trip(way: str, params, optimizer, kind: str):
    """(parameters, optimizer) after a round trip, independent of the originals."""
    if way == "deepcopy":
        return copy.deepcopy((params, optimizer))
    if way == "pickle":
        return pickle.loads(pickle.dumps((params, optimizer)))
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    state = optimizer.state_dict()
    if way == "weights_only":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    fresh = pf.MaskedAdam(copies, lr=0.9, **KINDS[kind])
    fresh.load_state_dict(copy.deepcopy(state))
    return copies, fresh


@pytest.mark.parametrize("way", ["state_dict", "weights_only", "deepcopy", "pickle"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_round_trips_go_on_bit_for_bit(kind, way):
    params = make_params(dtype_of(kind))
    optimizer = pf.MaskedAdam(params, lr=0.02, **KINDS[kind])
    masks = masks_of(kind, params)
    grads = [make_grads(params, missing=0.2 if kind == "plain" else 0.0) for _ in range(4)]
    cut = 3 if kind == "counts" else 2
    steps(params, optimizer, masks[:cut], grads[:cut])
    copies, other = round_trip(way, params, optimizer, kind)
    before = [{k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in params]
    if kind == "counts":
        assert "counts" in before[0]
    for p, q in zip(params, copies, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert same_bits(other.state[q][key].float(), value.float()) and other.state[q][key].dtype == value.dtype, (
                key
            )
    steps(copies, other, masks[cut:], [[None if g is None else g.clone() for g in these] for these in grads[cut:]])
    # The copy is independent.
    for p, saved in zip(params, before, strict=True):
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in saved.items())
    steps(params, optimizer, masks[cut:], grads[cut:])
    assert other.param_groups[0]["lr"] == 0.02
    for p, q in zip(params, copies, strict=True):
        assert same_bits(p.detach(), q.detach())
        for key, value in optimizer.state[p].items():
            assert torch.equal(other.state[q][key], value), key


def test_state_keeps_its_precision_for_bfloat16_parameters():
    params = make_params(torch.bfloat16)
    optimizer = pf.MaskedAdam(params, master_weights=True, ema_decay=0.9)
    steps(params, optimizer, [None], [make_grads(params)])
    loaded = pf.MaskedAdam(params, master_weights=True, ema_decay=0.9)
    loaded.load_state_dict(optimizer.state_dict())
    for param in params:
        for key in ("exp_avg", "exp_avg_sq", "master_param", "ema"):
            assert loaded.state[param][key].dtype == torch.float32, key


def test_beta1_of_0_stores_no_first_moment():
    params = make_params()
    optimizer = pf.MaskedAdam(params, betas=(0.0, 0.99))
    steps(params, optimizer, [None], [make_grads(params)])
    assert not any("exp_avg" in optimizer.state[p] for p in params)
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="first moment"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_torch_state_without_its_first_moment():
    params = make_params(torch.float32)
    theirs = torch.optim.Adam(params)
    set_grads(params, make_grads(params))
    theirs.step()
    ours = pf.MaskedAdam(params, betas=(0.0, 0.999))
    state = copy.deepcopy(theirs.state_dict())
    state["param_groups"][0]["betas"] = (0.0, 0.999)
    ours.load_state_dict(state)
    assert not any("exp_avg" in ours.state[p] for p in params) and all("exp_avg_sq" in ours.state[p] for p in params)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_export_to_torch(beta1, packed):
    params = make_params(torch.float32)
    optimizer = pf.MaskedAdam(params, betas=(beta1, 0.99), packed=packed, amsgrad=True, ema_decay=0.9)
    mask = random_mask(params)
    steps(params, optimizer, [mask] * 3, [make_grads(params) for _ in range(3)])
    exported = optimizer.to_torch_state_dict()
    theirs = torch.optim.Adam(params, amsgrad=True)
    theirs.load_state_dict(exported)
    for i, param in enumerate(params):
        state = theirs.state[param]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} and float(state["step"]) == 3
        assert state["exp_avg_sq"].shape == param.shape and not state["exp_avg_sq"][~mask[i]].any()
        assert (state["exp_avg_sq"][mask[i]] > 0).all()
        assert bool(state["exp_avg"].any()) == (beta1 != 0 and bool(mask[i].any()))
    theirs.step()


def test_export_of_differing_counts_is_refused():
    params = make_params(torch.float32)
    optimizer = pf.MaskedAdam(params)
    steps(params, optimizer, [random_mask(params), random_mask(params)], [make_grads(params), make_grads(params)])
    with pytest.raises(ValueError, match="different numbers of updates"):
        optimizer.to_torch_state_dict()


def test_failed_load_changes_nothing():
    params = make_params(torch.float32)
    optimizer = pf.MaskedAdam(params, lr=0.3)
    steps(params, optimizer, [None], [make_grads(params)])
    good = copy.deepcopy(optimizer.state_dict())
    wrong_shape = copy.deepcopy(good)
    wrong_shape["state"][len(params) - 1]["exp_avg_sq"] = torch.zeros(3)
    wrong_shape["param_groups"][0]["lr"] = 0.7
    fewer = pf.MaskedAdam(params[:2]).state_dict()
    other = [nn.Parameter(p.detach().clone()) for p in params]
    packed = pf.MaskedAdam(other, packed=True)
    steps(other, packed, [random_mask(other)], [make_grads(other)])
    for wrong in (wrong_shape, fewer, packed.state_dict()):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(wrong)
        assert optimizer.param_groups[0]["lr"] == 0.3
        for i, param in enumerate(params):
            for key, value in good["state"][i].items():
                assert torch.equal(optimizer.state[param][key], value)
    with pytest.raises(ValueError, match="not packed"):
        packed.load_state_dict(good)
    optimizer.step()


# ---- low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_are_float32_training(dtype, backend):
    start = torch.randn(300).to(dtype)
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours = pf.MaskedAdam([low], lr=1e-4, master_weights=True, weight_decay=0.1, ema_decay=0.9, backend=backend)
    twin = pf.MaskedAdam([high], lr=1e-4, weight_decay=0.1, ema_decay=0.9, backend=backend)
    for _ in range(5):
        low.grad = torch.randn(300).to(dtype)
        high.grad = low.grad.float()
        ours.step()
        twin.step()
    assert torch.allclose(ours.state[low]["master_param"], high, rtol=1e-6, atol=1e-7)
    assert torch.equal(low, ours.state[low]["master_param"].to(dtype))
    assert torch.allclose(ours.ema_parameters()[0], twin.ema_parameters()[0], rtol=1e-6, atol=1e-7)


def test_small_updates_survive_stochastic_rounding():
    made = {}
    for rounding in (False, True):
        param = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = pf.MaskedAdam([param], lr=1e-4, stochastic_rounding=rounding, seed=1)
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
        made[rounding] = param.detach().float().mean().item()
    assert made[False] == 1.0 and made[True] == pytest.approx(1 - 20e-4, abs=3e-4)


def test_stochastic_rounding_is_reproducible_by_seed():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(500).bfloat16())
        optimizer = pf.MaskedAdam([param], lr=1e-3, stochastic_rounding=True, seed=seed)
        for _ in range(3):
            param.grad = torch.randn(500).bfloat16()
            optimizer.step()
        results.append(param.detach())
    assert same_bits(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("chosen", [None, "reference"])
def test_stochastic_rounding_depends_on_the_parameter_and_not_on_the_call(chosen):
    """Neither groups nor dtypes share random bits, and a parameter without a gradient does not shift those after it."""
    values, grads = torch.randn(500).bfloat16(), torch.randn(500).bfloat16()

    def stepped(groups, frozen=(), half=()):
        params = [nn.Parameter(values.to(torch.float16 if i in half else torch.bfloat16, copy=True)) for i in range(3)]
        parts = [{"params": [params[i] for i in group]} for group in groups]
        optimizer = pf.MaskedAdam(parts, lr=1e-3, stochastic_rounding=True, seed=4, backend=chosen)
        for i, param in enumerate(params):
            param.grad = None if i in frozen else grads.to(param.dtype)
        optimizer.step()
        return [param.detach() for param in params]

    together = stepped([[0, 1, 2]])
    assert not same_bits(together[0], together[1]) and not same_bits(together[1], together[2])
    for other in (stepped([[0], [1, 2]]), stepped([[0], [1], [2]])):
        assert all(map(same_bits, together, other))
    assert same_bits(together[2], stepped([[0, 1, 2]], frozen=[0, 1])[2])
    assert same_bits(together[2], stepped([[0, 1, 2]], half=[0])[2])


# ---- loss scaling


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", ["plain", "masked", "joint"])
def test_grad_scaler(kind, unscale):
    params, other = make_params(torch.float32), []
    other = [nn.Parameter(p.detach().clone()) for p in params]
    ours, twin = pf.MaskedAdam(params, lr=0.1), pf.MaskedAdam(other, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    mask = random_mask(params) if kind != "plain" else None
    for step in range(5):
        factors = make_grads(params)
        forget = make_grads(params) if kind == "joint" else None
        overflow = step == 2
        loss = sum((p * f).sum() for p, f in zip(params, factors, strict=True))
        ours.zero_grad()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        if overflow:
            params[1].grad[0] = math.inf
        scaled = None if forget is None else [f * (1.0 if unscale else scale) for f in forget]
        if unscale:
            scaler.unscale_(ours)
        before = [p.detach().clone() for p in params]
        scaler.step(ours, mask=mask, masked_grads=scaled)
        scaler.update()
        if overflow:
            assert all(same_bits(p.detach(), b) for p, b in zip(params, before, strict=True))
            assert float(ours.state[params[0]]["step"]) == 2 and scaler.get_scale() < scale
            continue
        set_grads(other, factors)
        twin.step(mask=mask, masked_grads=forget)
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(params, other, strict=True))
    assert float(ours.state[params[0]]["step"]) == float(twin.state[other[0]]["step"]) == 4


def test_first_step_with_inf_and_packed_state_with_inf():
    for options in ({}, {"packed": True}, {"ema_decay": 0.5}):
        param = nn.Parameter(torch.ones(50))
        optimizer = pf.MaskedAdam([param], lr=0.1, **options)
        masks = [random_mask([param]), random_mask([param])]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for index, bad in ((0, True), (0, False), (1, True), (1, False)):
            before = copy.deepcopy((param.detach(), {k: v for k, v in optimizer.state[param].items() if k != "step"}))
            scaler.scale((param * torch.randn(50)).sum()).backward()
            if bad:
                param.grad[3] = math.nan
            scaler.step(optimizer, mask=masks[index])
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(param.detach(), before[0]) == bad
            if bad:
                after = {k: v for k, v in optimizer.state[param].items() if k != "step"}
                assert all(torch.equal(after[key], value) for key, value in before[1].items())
        assert float(optimizer.state[param]["step"]) == 2 or "counts" in optimizer.state[param]


# ---- non-finite gradients


def bad_gradients(params) -> tuple[list[torch.Tensor], int]:
    grads = make_grads(params)
    grads[0].view(-1)[:2] = torch.tensor([math.nan, -math.inf])
    grads[1][5] = math.inf
    return grads, 3


@pytest.fixture
def trained():
    params = [nn.Parameter(torch.randn(40)), nn.Parameter(torch.randn(33))]

    def make(policy: str, backend=None, **options):
        optimizer = pf.MaskedAdam(params, lr=0.1, nonfinite=policy, backend=backend, **options)
        steps(params, optimizer, [None], [make_grads(params)])
        return params, optimizer

    return make


def test_propagate_equals_torch(trained):
    params, optimizer = trained("propagate")
    steps(params, optimizer, [None], [bad_gradients(params)[0]])
    assert sum(int((~p.isfinite()).sum()) for p in params) == 3 and optimizer.nonfinite_count == 0


def test_skip_changes_nothing(trained, backend):
    params, optimizer = trained("skip", backend)
    before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()["state"]))
    grads, bad = bad_gradients(params)
    steps(params, optimizer, [None], [grads])
    assert all(same_bits(p.detach(), b) for p, b in zip(params, before[0], strict=True))
    for i, state in before[1].items():
        assert all(torch.equal(optimizer.state_dict()["state"][i][key], value) for key, value in state.items())
    assert optimizer.nonfinite_count == bad and optimizer.sparsity_stats()["nonfinite"] == bad
    steps(params, optimizer, [None], [make_grads(params)])
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_zero_treats_nonfinite_entries_as_zero(trained, backend):
    params, optimizer = trained("zero", backend)
    twins, other = copy.deepcopy((params, optimizer))
    grads, bad = bad_gradients(params)
    steps(params, optimizer, [None], [[g.clone() for g in grads]])
    steps(twins, other, [None], [[g.nan_to_num(0.0, 0.0, 0.0) for g in grads]])
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, twins, strict=True))
    assert optimizer.nonfinite_count == bad


def test_raise_changes_nothing(trained, backend):
    params, optimizer = trained("raise", backend)
    before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()["state"]))
    grads, bad = bad_gradients(params)
    with pytest.raises(FloatingPointError, match=f"{bad} gradient entries"):
        steps(params, optimizer, [None], [grads])
    assert all(same_bits(p.detach(), b) for p, b in zip(params, before[0], strict=True))
    for i, state in before[1].items():
        assert all(torch.equal(optimizer.state_dict()["state"][i][key], value) for key, value in state.items())


@pytest.mark.parametrize("policy", ["skip", "raise", "zero"])
def test_policies_check_updated_entries_only(policy, trained, backend):
    params, optimizer = trained(policy, backend)
    mask = random_mask(params)
    grads = make_grads(params)
    for i, grad in enumerate(grads):
        grad[~mask[i]] = math.nan
    before = [p.detach().clone() for p in params]
    steps(params, optimizer, [mask], [grads])
    assert optimizer.nonfinite_count == 0
    assert all(((p.detach() != b) == mask[i]).all() for i, (p, b) in enumerate(zip(params, before, strict=True)))
    grads[0][mask[0].nonzero()[0]] = math.inf
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="1 gradient entries"):
            steps(params, optimizer, [mask], [grads])
    else:
        steps(params, optimizer, [mask], [grads])
        assert optimizer.nonfinite_count == 1


def test_nonfinite_count_of_joint_steps(trained):
    params, optimizer = trained("zero")
    mask = random_mask(params)
    grads, forget = make_grads(params), make_grads(params)
    grads[0][0], forget[1][:] = math.nan, math.inf
    expected = sum(
        oracle.nonfinite(g.numpy(), f.numpy(), mask[i].numpy(), True, None)
        for i, (g, f) in enumerate(zip(grads, forget, strict=True))
    )
    set_grads(params, grads)
    optimizer.step(mask=mask, masked_grads=forget)
    assert optimizer.nonfinite_count == expected == 1 + int(mask[1].sum())
    assert all(p.isfinite().all() for p in params)
