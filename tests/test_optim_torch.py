"""MaskedAdam without a mask is torch.optim.Adam / AdamW: torch's own test cases, steps, state dicts, schedulers."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    optim_error_inputs_func_adam,
    optim_inputs_func_adam,
)

import pecker_fast as pf
from tests.inputs import same_bits
from tests.optim_oracle import make_grads, make_params, set_grads

# The cases that torch keeps for other devices (Tensor lr and betas, capturable) are run here on the CPU as well.
CASES = {
    f"{case.desc}-{device}": case.kwargs
    for device in ("cpu", "cuda", "mps")
    for case in optim_inputs_func_adam(device, torch.float32)
}
ERROR_CASES = {case.optimizer_error_input.desc: case for case in optim_error_inputs_func_adam("cpu", torch.float32)}
TOLERANCE = {torch.float64: (1e-12, 1e-13), torch.float32: (1e-5, 1e-6)}


def torch_kwargs(kwargs: dict) -> dict:
    """As numbers: torch takes capturable on the CPU only while compiling, and computes with a float32 lr in float32."""
    kwargs = {k: v for k, v in copy.deepcopy(kwargs).items() if k != "capturable"}
    if "lr" in kwargs:
        kwargs["lr"] = float(kwargs["lr"])
    if "betas" in kwargs:
        kwargs["betas"] = tuple(float(b) for b in kwargs["betas"])
    return kwargs


def twins(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    params = make_params(dtype)
    return params, [nn.Parameter(p.detach().clone()) for p in params]


def assert_close(ours, theirs, dtype, what: str) -> None:
    rtol, atol = TOLERANCE[dtype]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.allclose(a.detach(), b.detach().to(a.dtype), rtol=rtol, atol=atol), f"{what} {i}"


def assert_same_state(ours, theirs, params, other, dtype) -> None:
    for p, q in zip(params, other, strict=True):
        if q not in theirs.state:
            assert "step" not in ours.state[p]
            continue
        assert float(ours.state[p]["step"]) == float(theirs.state[q]["step"])
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert (key in ours.state[p]) == (key in theirs.state[q])
            if key in ours.state[p]:
                assert ours.state[p][key].shape == q.shape
                assert_close([ours.state[p][key]], [theirs.state[q][key]], dtype, key)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", list(CASES))
def test_twenty_steps_of_torch_cases(case, dtype, optimizer):
    kwargs = CASES[case]
    params, other = twins(dtype)
    decoupled = {"decoupled_weight_decay": True, "weight_decay": 1e-2} if optimizer is torch.optim.AdamW else {}
    ours = pf.MaskedAdam(params, **{**decoupled, **copy.deepcopy(kwargs)})
    theirs = optimizer(other, **torch_kwargs(kwargs))
    frozen = params[1].detach().clone()
    for step in range(20):
        # Gradients that are missing, parameters frozen for a while, and memory formats that differ.
        grads = make_grads(params, missing=0.2 if step % 3 else 0.0)
        if step < 5:
            grads[1] = None
            assert torch.equal(params[1], frozen)
        set_grads(params, grads)
        set_grads(other, [None if g is None else g.clone() for g in grads])
        ours.step()
        theirs.step()
    assert_close(params, other, dtype, "parameter")
    assert_same_state(ours, theirs, params, other, dtype)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_twenty_steps_of_all_flags(flags, backend, small):
    amsgrad, maximize, decoupled = flags
    kwargs = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": amsgrad}
    params, other = twins(torch.float32)
    ours = pf.MaskedAdam(params, maximize=maximize, decoupled_weight_decay=decoupled, backend=backend, **kwargs)
    theirs = torch.optim.Adam(other, maximize=maximize, decoupled_weight_decay=decoupled, **kwargs)
    for _ in range(5 if small else 20):
        grads = make_grads(params)
        set_grads(params, grads)
        set_grads(other, grads)
        ours.step()
        theirs.step()
    assert_close(params, other, torch.float32, "parameter")
    assert_same_state(ours, theirs, params, other, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_nearer_to_the_truth_than_torch(dtype):
    # The means of bf16 are 1.3 % apart; with this many entries their noise is below 0.1 %.
    start = torch.randn(200_000).to(dtype)
    grads = [torch.randn(200_000).to(dtype) for _ in range(10)]
    made = {}
    for name, kind, as_dtype in (
        ("ours", pf.MaskedAdam, dtype),
        ("torch", torch.optim.Adam, dtype),
        ("truth", torch.optim.Adam, torch.float64),
    ):
        param = nn.Parameter(start.clone().to(as_dtype))
        optimizer = kind([param], lr=0.05, eps=1e-4)
        for grad in grads:
            param.grad = grad.to(as_dtype)
            optimizer.step()
        made[name] = param.detach().double()
    ours, torchs = ((made[name] - made["truth"]).abs().mean() for name in ("ours", "torch"))
    assert ours <= torchs


@pytest.mark.parametrize("case", list(ERROR_CASES))
def test_torch_error_cases(case):
    error_case = ERROR_CASES[case]
    error_input = error_case.optimizer_error_input
    assert error_case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(error_case.error_type, Warning):
        with pytest.warns(error_case.error_type, match=error_case.error_regex):
            pf.MaskedAdam(error_input.params, **error_input.kwargs)
        return
    with pytest.raises(error_case.error_type, match=error_case.error_regex):
        pf.MaskedAdam(error_input.params if error_input.params is not None else [torch.zeros(2)], **error_input.kwargs)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value"),
        ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
    ],
)
def test_errors_that_torch_raises_too(kwargs, error, message):
    for kind in (torch.optim.Adam, pf.MaskedAdam):
        with pytest.raises(error, match=message):
            kind([torch.zeros(3, requires_grad=True)], **kwargs)


# ---- state dicts


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dicts_are_exchanged_with_torch(dtype, amsgrad):
    params, other = twins(dtype)
    kwargs = {"lr": 0.01, "amsgrad": amsgrad, "weight_decay": 0.1}
    pair = [(params, pf.MaskedAdam(params, **kwargs)), (other, torch.optim.Adam(other, **kwargs))]

    def steps(count: int) -> None:
        for _ in range(count):
            grads = make_grads(params, missing=0.2)
            for these, optimizer in pair:
                set_grads(these, [None if g is None else g.clone() for g in grads])
                optimizer.step()

    for _ in range(2):
        steps(4)
        ours, theirs = pair[0][1].state_dict(), pair[1][1].state_dict()
        assert ours["state"].keys() == theirs["state"].keys()
        for i, state in theirs["state"].items():
            assert ours["state"][i].keys() == state.keys()
        assert set(theirs["param_groups"][0]) <= set(ours["param_groups"][0])
        # Each continues from the state of the other.
        pair = [
            (params, pf.MaskedAdam(params, lr=0.5)),
            (other, torch.optim.Adam(other, lr=0.5)),
        ]
        pair[0][1].load_state_dict(copy.deepcopy(theirs))
        pair[1][1].load_state_dict(copy.deepcopy(ours))
        assert pair[0][1].param_groups[0]["lr"] == 0.01 and pair[0][1].param_groups[0]["amsgrad"] == amsgrad
    steps(4)
    assert_close(params, other, dtype, "parameter")


def test_older_state_dicts_with_numbers_as_steps():
    params, other = twins(torch.float32)
    theirs = torch.optim.Adam(other)
    for _ in range(3):
        set_grads(other, make_grads(other))
        theirs.step()
    old = copy.deepcopy(theirs.state_dict())
    for state in old["state"].values():
        state["step"] = 3
    for name in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        old["param_groups"][0].pop(name, None)
    ours = pf.MaskedAdam(params)
    ours.load_state_dict(old)
    assert all(float(ours.state[p]["step"]) == 3 for p in params)
    with torch.no_grad():
        for p, q in zip(params, other, strict=True):
            p.copy_(q)
    grads = make_grads(params)
    for these, optimizer in ((params, ours), (other, theirs)):
        set_grads(these, grads)
        optimizer.step()
    assert_close(params, other, torch.float32, "parameter")


# ---- learning rates, groups, hooks, closures


def test_parameter_groups_with_their_own_options():
    params, other = twins(torch.float64)

    def groups(p):
        return [
            {"params": p[:2], "lr": 0.1, "weight_decay": 0.3},
            {"params": p[2:4], "betas": (0.5, 0.9), "maximize": True},
            {"params": p[4:], "amsgrad": True, "eps": 1e-3},
        ]

    ours, theirs = pf.MaskedAdam(groups(params), lr=0.01), torch.optim.Adam(groups(other), lr=0.01)
    late, late_other = nn.Parameter(torch.ones(5).double()), nn.Parameter(torch.ones(5).double())
    for step in range(6):
        if step == 3:
            ours.add_param_group({"params": [late], "lr": 1.0})
            theirs.add_param_group({"params": [late_other], "lr": 1.0})
            params, other = [*params, late], [*other, late_other]
        if step == 4:
            for optimizer in (ours, theirs):
                optimizer.param_groups[1]["lr"] = 0.2
                optimizer.param_groups[0]["weight_decay"] = 0.0
                optimizer.param_groups[0]["betas"] = (0.8, 0.8)
        grads = make_grads(params, missing=0.2)
        for these, optimizer in ((params, ours), (other, theirs)):
            set_grads(these, grads)
            optimizer.step()
    assert_close(params, other, torch.float64, "parameter")
    assert_same_state(ours, theirs, params, other, torch.float64)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: ExponentialLR(o, 0.7),
        lambda o: CosineAnnealingLR(o, 5),
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=8, cycle_momentum=True),
    ],
    ids=["exponential", "cosine", "one_cycle_with_momentum"],
)
def test_schedulers(schedule, tensor_lr):
    params, other = twins(torch.float64)
    lr = lambda: torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05  # noqa: E731
    pairs = [(params, pf.MaskedAdam(params, lr=lr())), (other, torch.optim.Adam(other, lr=lr()))]
    schedulers = [schedule(optimizer) for _, optimizer in pairs]
    for _ in range(6):
        grads = make_grads(params)
        for (these, optimizer), scheduler in zip(pairs, schedulers, strict=True):
            set_grads(these, grads)
            optimizer.step()
            scheduler.step()
    assert_close(params, other, torch.float64, "parameter")
    assert float(pairs[0][1].param_groups[0]["lr"]) == pytest.approx(float(pairs[1][1].param_groups[0]["lr"]))


def test_tensor_lr_is_read_at_every_step():
    param = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = pf.MaskedAdam([param], lr=lr, betas=(0.0, 0.9), eps=0.0)
    param.grad = torch.ones(4, dtype=torch.float64)
    optimizer.step()
    lr.fill_(0.25)
    optimizer.step()
    assert torch.allclose(param.detach(), torch.tensor(-0.75, dtype=torch.float64))
    assert optimizer.param_groups[0]["lr"] is lr


def test_closures():
    param = nn.Parameter(torch.tensor([3.0]))
    optimizer = pf.MaskedAdam([param], lr=0.1)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    assert optimizer.step(closure).item() == 9.0 and calls == [True]
    mask = pf.SaliencyMask.from_bool([torch.tensor([False])])
    assert optimizer.step(closure, mask=mask).item() == pytest.approx(2.9**2)
    assert param.item() == pytest.approx(2.9) and optimizer.step() is None


def test_hooks_run_in_order():
    param = nn.Parameter(torch.ones(3))
    optimizer = pf.MaskedAdam([param])
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("pre1"))
    optimizer.register_step_pre_hook(lambda *_: order.append("pre2"))
    optimizer.register_step_post_hook(lambda *_: order.append("post1"))
    optimizer.register_step_post_hook(lambda *_: order.append("post2"))
    optimizer.register_state_dict_pre_hook(lambda *_: order.append("save_pre"))
    optimizer.register_state_dict_post_hook(lambda *_: order.append("save_post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: order.append("load_pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: order.append("load_post"))
    param.grad = torch.ones(3)
    optimizer.step(mask=pf.SaliencyMask.from_bool([torch.ones(3, dtype=torch.bool)]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == ["pre1", "pre2", "post1", "post2", "save_pre", "save_post", "load_pre", "load_post"]


def test_frozen_and_unfrozen_layers():
    params, other = twins(torch.float64)
    ours, theirs = pf.MaskedAdam(params, lr=0.1), torch.optim.Adam(other, lr=0.1)
    for step in range(6):
        for these, optimizer in ((params, ours), (other, theirs)):
            torch.manual_seed(step)
            these[0].requires_grad_(step % 2 == 0)
            optimizer.zero_grad(set_to_none=True)
            loss = sum((p * torch.randn(p.shape, dtype=torch.float64)).sum() for p in these if p.requires_grad)
            loss.backward()
            optimizer.step()
    assert_close(params, other, torch.float64, "parameter")
    assert float(ours.state[params[0]]["step"]) == 3 and float(ours.state[params[1]]["step"]) == 6


def test_gradients_zeroed_in_place_and_parameters_moved_to_other_memory():
    params, other = twins(torch.float64)
    ours, theirs = pf.MaskedAdam(params, lr=0.1), torch.optim.Adam(other, lr=0.1)
    for step in range(4):
        grads = make_grads(params)
        for these, optimizer in ((params, ours), (other, theirs)):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            if step == 2:
                for param in these:
                    param.data = param.data.clone()
            set_grads(these, grads)
            optimizer.step()
    assert_close(params, other, torch.float64, "parameter")


def test_autograd_notices_changed_parameters():
    param = nn.Parameter(torch.ones(3))
    loss = (param**2).sum()
    param.grad = torch.ones(3)
    pf.MaskedAdam([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_a_compiled_model():
    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager")
    pairs = [(compiled, pf.MaskedAdam(compiled.named_parameters())), (twin, pf.MaskedAdam(twin.named_parameters()))]
    x = torch.randn(16, 4)
    for _ in range(3):
        for module, optimizer in pairs:
            optimizer.zero_grad()
            module(x).square().mean().backward()
            # Made from one module, used on parameters that carry the prefix of the other.
            mask = (
                pf.saliency_mask({n: p.grad for n, p in twin.named_parameters()}, density=0.5)
                if module is twin
                else None
            )
            mask = mask or pf.saliency_mask(compiled, density=0.5)
            optimizer.step(mask=mask)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert not any(same_bits(a.detach(), torch.zeros_like(a)) for a in net.parameters())


def test_profiler_records_and_hooks_equal_torch():
    param = nn.Parameter(torch.ones(3))
    optimizer = pf.MaskedAdam([param], lr=0.1)
    param.grad = torch.ones(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert [e.name for e in profile.events()].count("Optimizer.step#MaskedAdam.step") == 1
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("before any")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after any")),
    ]
    optimizer.step()
    assert calls == ["before any", "before", "after", "after any"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 4 and torch.allclose(param, torch.tensor(0.7))
    other = pf.MaskedAdam([param], lr=0.1)
    other.register_step_post_hook(lambda *_: calls.append("other"))
    other.step()
    assert calls[-1] == "other"
