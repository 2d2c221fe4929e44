"""MaskedAdam while the user edits parameter groups, state and parameters, compared with torch.optim.Adam."""

import copy

import pytest
import torch
from torch import nn

import pecker_fast as pf
from tests.inputs import same_bits

LR = 0.1


def ones(count: int, *shape: int) -> list[nn.Parameter]:
    """Parameters of zeros with gradients of ones."""
    params = [nn.Parameter(torch.zeros(shape or (2,))) for _ in range(count)]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def both(make_params, edit, **options):
    """``edit(optimizer, params)`` with MaskedAdam and with torch.optim.Adam, each on its own parameters."""
    results = []
    for kind in (pf.MaskedAdam, torch.optim.Adam):
        params = make_params()
        optimizer = kind(params, lr=LR, **options)
        edit(optimizer, params)
        results.append((params, optimizer))
    (ours, optimizer), (theirs, other) = results
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6), (a, b)
        for key, value in other.state.get(b, {}).items():
            assert torch.allclose(optimizer.state[a][key], value, rtol=1e-6), key
    return ours, optimizer


# ---- parameter groups


def test_parameter_removed_from_its_group_does_not_move():
    def edit(optimizer, params):
        optimizer.step()
        optimizer.param_groups[0]["params"] = [params[0]]
        optimizer.step()

    params, _ = both(lambda: ones(2), edit)
    assert torch.allclose(params[1], torch.tensor(-LR)) and torch.allclose(params[0], torch.tensor(-2 * LR))


def test_lists_of_parameters_changed_in_place():
    def edit(optimizer, params):
        held = optimizer.param_groups[0]["params"]
        optimizer.step()
        removed = held.pop(0)
        optimizer.step()
        held.append(removed)
        optimizer.step()
        held[0], held[2] = held[2], held[0]
        optimizer.step()
        optimizer.param_groups[0]["params"] = tuple(held)
        optimizer.step()

    both(lambda: ones(3), edit)


def test_a_parameter_replaced_by_another():
    def edit(optimizer, params):
        optimizer.step()
        new = ones(1)[0]
        optimizer.param_groups[0]["params"][1] = params[1] = new
        optimizer.step()
        # The same shape and value, so that it differs from the old one only by identity.
        params[0] = ones(1)[0]
        params[0].data.copy_(optimizer.param_groups[0]["params"][0])
        optimizer.param_groups[0]["params"][0] = params[0]
        optimizer.step()

    both(lambda: ones(2), edit)


def test_groups_rebuilt_added_and_removed():
    def edit(optimizer, params):
        optimizer.step()
        old = optimizer.param_groups[0]
        optimizer.param_groups = [{**old, "params": params[:1], "lr": 0.5}, {**old, "params": params[1:3]}]
        optimizer.step()
        optimizer.param_groups.append({**old, "params": params[3:], "lr": 0.01})
        optimizer.step()
        del optimizer.param_groups[1]
        optimizer.step()
        optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = params[3:], params[:1]
        optimizer.step()
        optimizer.add_param_group({"params": params[1:3], "lr": 0.2})
        optimizer.step()

    both(lambda: ones(4), edit)


def test_a_group_made_by_hand_lacks_options():
    params = ones(2)
    optimizer = pf.MaskedAdam(params, lr=LR, ema_decay=0.5)
    optimizer.param_groups = [{"params": [params[1]], "lr": 0.5}]
    optimizer.step()
    assert torch.equal(params[0], torch.zeros(2)) and torch.allclose(params[1], torch.tensor(-0.5))
    assert torch.allclose(optimizer.ema_parameters()[0], torch.tensor(-0.25))


def test_a_parameter_in_two_groups_is_refused():
    params = ones(2)
    optimizer = pf.MaskedAdam(params, lr=LR)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [params[0]]})
    with pytest.raises(ValueError, match="more than once"):
        optimizer.step()
    assert not params[0].any()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("betas", (0.9, 1.5), "beta parameter"),
        ("eps", -1.0, "epsilon"),
        ("weight_decay", -1.0, "weight_decay"),
        ("ema_decay", 0.5, "ema_decay is set in some"),
        ("packed", True, "packed is True in a parameter group"),
        ("variance", "both", "variance"),
        ("amsgrad", True, "amsgrad is on"),
    ],
)
def test_options_changed_by_hand_are_checked_before_anything_changes(option, value, message):
    params = ones(2)
    optimizer = pf.MaskedAdam(params, lr=LR)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    old = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert all(same_bits(p.detach(), b) for p, b in zip(params, before, strict=True))
    assert float(optimizer.state[params[0]]["step"]) == 1
    optimizer.param_groups[0][option] = old
    optimizer.step()
    assert torch.allclose(params[0], torch.tensor(-2 * LR))


def test_names_follow_their_parameters():
    params = {name: ones(1)[0] for name in "abc"}
    optimizer = pf.MaskedAdam(params.items(), lr=LR)
    a, b, c = params.values()
    masks = {name: pf.SaliencyMask.from_bool({n: torch.full((2,), n == name) for n in "abcd"}) for name in "abcd"}

    def moved(name: str) -> list[bool]:
        before = [p.detach().clone() for p in (a, b, c)]
        optimizer.step(mask=masks[name])
        return [not torch.equal(p, q) for p, q in zip((a, b, c), before, strict=True)]

    assert moved("b") == [False, True, False]
    # The names are unchanged: three for two parameters.
    optimizer.param_groups[0]["params"] = [c, a]
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c"]
    assert moved("a") == [True, False, False] and moved("c") == [False, False, True]
    assert optimizer.param_groups[0]["param_names"] == ["c", "a"]
    # As many names as parameters, in another order.
    optimizer.param_groups[0]["params"] = [a, c]
    assert moved("a") == [True, False, False]
    # A parameter in the place of another one gets its name; an additional one has none.
    b = ones(1)[0]
    optimizer.param_groups[0]["params"] = [b, c]
    assert moved("a") == [False, True, False]
    optimizer.param_groups[0]["params"] = [b, c, a]
    with pytest.raises(ValueError, match=r"named_parameters\(\)"):
        optimizer.step(mask=masks["a"])
    # Names passed with the parameters are used.
    optimizer.param_groups[0].update(params=[a, b], param_names=["d", "a"])
    assert moved("d") == [True, False, False]
    optimizer.param_groups = [{"params": [b], "lr": LR}]
    assert moved("a") == [False, True, False]


# ---- state


def test_cleared_state_starts_again():
    def edit(optimizer, params):
        for _ in range(2):
            optimizer.step()
        optimizer.state.clear()
        for param in params:
            param.grad = -param.grad
        optimizer.step()
        assert float(optimizer.state_dict()["state"][0]["step"]) == 1

    params, _ = both(lambda: ones(2), edit)
    assert torch.allclose(params[0], torch.tensor(-LR), atol=1e-6)


def test_state_replaced_and_removed():
    def edit(optimizer, params):
        optimizer.step()
        del optimizer.state[params[0]]
        optimizer.step()
        optimizer.state[params[1]] = copy.deepcopy(optimizer.state[params[0]])
        optimizer.step()
        optimizer.state[params[0]]["exp_avg"] = torch.full((2,), 0.5)
        optimizer.step()
        optimizer.state[params[0]]["step"] = torch.tensor(7.0)
        optimizer.step()
        # Equal in value, but another tensor, which the step must count up.
        optimizer.state[params[1]]["step"] = own = optimizer.state[params[1]]["step"].clone()
        optimizer.step()
        optimizer.state[params[1]]["step"].add_(3)
        optimizer.state[params[0]]["exp_avg_sq"].mul_(4)
        optimizer.step()
        assert optimizer.state[params[1]]["step"] is own
        optimizer.state[params[0]]["exp_avg"].data = torch.full((2,), -0.5)
        optimizer.step()
        optimizer.state = copy.copy(optimizer.state)
        optimizer.state[params[0]] = dict(optimizer.state[params[0]], exp_avg=torch.ones(2))
        optimizer.step()
        optimizer.state[params[0]] = {}
        optimizer.step()

    both(lambda: ones(2), edit)
    # One entry, replaced by an equal tensor, which `==` cannot distinguish from the old one.
    both(lambda: ones(2, 1), lambda optimizer, params: edit_of_one_entry(optimizer, params[0]))


def edit_of_one_entry(optimizer, param) -> None:
    optimizer.step()
    held = optimizer.state[param]["exp_avg"]
    optimizer.state[param]["exp_avg"] = new = held.clone()
    held.fill_(100.0)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"] is new


def test_state_of_other_dtypes_and_layouts_is_converted():
    params = [nn.Parameter(torch.zeros(4, 6))]
    params[0].grad = torch.ones(4, 6)
    optimizer = pf.MaskedAdam(params, lr=LR)
    optimizer.step()
    state = optimizer.state[params[0]]
    expected = state["exp_avg"].clone()
    held = state["exp_avg"] = state["exp_avg"].double().t().contiguous().t()
    state["step"] = 1
    optimizer.step()
    assert held is state["exp_avg"] and held.dtype == torch.float32 and held.is_contiguous()
    assert torch.allclose(held, expected + 0.1 * (1 - expected)) and float(state["step"]) == 2
    held.t_().t_()
    held.data = held.data.t().contiguous().t()
    optimizer.step()
    assert torch.allclose(params[0], torch.tensor(-3 * LR))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda state: state.pop("exp_avg_sq"), 'no "exp_avg_sq"'),
        (lambda state: state.pop("exp_avg"), "no first moment"),
        (lambda state: state.pop("step"), 'but no "step"'),
        (lambda state: state.update(exp_avg=torch.zeros(3)), r"exp_avg of parameter b has shape \(3,\)"),
    ],
)
def test_a_state_with_gaps_is_refused(edit, message):
    params = ones(2)
    optimizer = pf.MaskedAdam(zip("ab", params, strict=True), lr=LR)
    optimizer.step()
    edit(optimizer.state[params[1]])
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.allclose(params[0], torch.tensor(-LR)) and torch.allclose(params[1], torch.tensor(-LR))
    optimizer.state[params[1]].clear()
    optimizer.step()
    assert torch.allclose(params[1], torch.tensor(-2 * LR)) and float(optimizer.state[params[1]]["step"]) == 1


def test_inspecting_an_optimizer_leaves_its_state_empty():
    # Other code, such as torch.distributed.checkpoint, takes a non-empty state for a complete one.
    optimizer = pf.MaskedAdam(ones(2))
    optimizer.state_dict()
    optimizer.sparsity_stats()
    optimizer.to_torch_state_dict()
    assert not optimizer.state


def test_masked_steps_after_edits_of_the_state():
    mask = pf.SaliencyMask.from_bool([torch.tensor([True, False]), torch.tensor([True, True])])
    params = ones(2)
    optimizer = pf.MaskedAdam(params, lr=LR, betas=(0.0, 0.9), ema_decay=0.5)
    for _ in range(3):
        optimizer.step(mask=mask)
    optimizer.state.clear()
    before = [p.detach().clone() for p in params]
    optimizer.step(mask=mask)
    assert torch.allclose(params[0] - before[0], torch.tensor([-LR, 0.0]), atol=1e-6)
    # The average starts again at the parameters.
    assert torch.allclose(optimizer.ema_parameters()[1], before[1] - LR / 2)
    del optimizer.state[params[0]]
    optimizer.step()
    assert torch.allclose(params[0][1], torch.tensor(-LR)), "an entry first touched now moves by lr"


# ---- parameters


def images() -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(2, 3, 4, 5, dtype=torch.float64)), nn.Parameter(torch.randn(3, 7).double())]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


@pytest.mark.parametrize("ema", [False, True])
def test_parameters_with_a_new_memory_format(ema, backend):
    def edit(optimizer, params):
        for layout in (torch.channels_last, torch.contiguous_format, torch.channels_last):
            optimizer.step()
            params[0].data = params[0].data.to(memory_format=layout)
            params[1].data = params[1].data.t().contiguous().t()
            optimizer.step()
        # Other strides at the same address.
        square = params[1].data.new_zeros(7, 7)[:3]
        params[1].data = square.copy_(params[1].data)
        optimizer.step()

    if ema:
        plain = images()
        optimizer = pf.MaskedAdam(plain, lr=LR, ema_decay=0.5, backend=backend)
        expected = [p.detach().clone() for p in plain]
        for _ in range(3):
            held = [optimizer.state[p]["ema"] for p in plain]
            edit(optimizer, plain)
        averages = optimizer.ema_parameters()
        assert all(a is b for a, b in zip(averages, held, strict=True))
        params = images()
        other = torch.optim.Adam(params, lr=LR)
        for _ in range(3 * 7):
            other.step()
            expected = [e + 0.5 * (p.detach() - e) for e, p in zip(expected, params, strict=True)]
        assert all(torch.allclose(a, e) for a, e in zip(averages, expected, strict=True))
        assert all(torch.allclose(a, b) for a, b in zip(plain, params, strict=True))
    else:
        both(images, edit)


def test_channels_last_after_construction():
    # The average exists from the start, in the old layout.
    param = nn.Parameter(torch.zeros(1, 2, 1, 2))
    optimizer = pf.MaskedAdam([param], lr=LR, ema_decay=0.5)
    param.data = param.data.to(memory_format=torch.channels_last)
    param.grad = torch.tensor([[[[1.0, -1.0]], [[1.0, -1.0]]]])
    optimizer.step()
    assert torch.allclose(param.flatten(), torch.tensor([-LR, LR, -LR, LR]))
    assert torch.allclose(optimizer.ema_parameters()[0].flatten(), torch.tensor([-LR, LR, -LR, LR]) / 2)


def test_parameters_of_another_dtype():
    param = ones(1, 5)[0]
    optimizer = pf.MaskedAdam([param], lr=LR, ema_decay=0.5)
    optimizer.step()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        param.data = param.data.to(dtype)
        param.grad = torch.ones(5, dtype=dtype)
        optimizer.step()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(optimizer.state[param][key].dtype == wide for key in ("exp_avg", "exp_avg_sq", "ema"))
    assert torch.allclose(param, torch.tensor(-4 * LR), atol=2e-3) and float(optimizer.state[param]["step"]) == 4


def test_swapped_tensors():
    # module.to() does this under torch.__future__.set_swap_module_params_on_conversion.
    def edit(optimizer, params):
        optimizer.step()
        new = nn.Parameter(params[0].detach() * 2)
        torch.utils.swap_tensors(params[0], new)
        params[0].grad = torch.ones(2)
        optimizer.step()

    both(lambda: ones(2), edit)


def test_another_back_end_between_steps():
    def edit(optimizer, params):
        try:
            for backend in (None, "reference", None):
                if isinstance(optimizer, pf.MaskedAdam):
                    pf.set_backend(backend)
                optimizer.step()
                assert not isinstance(optimizer, pf.MaskedAdam) or optimizer._runtime.roster.native != bool(backend)
        finally:
            pf.set_backend(None)

    both(lambda: ones(2), edit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_adopt_external_writes(dtype, backend):
    param = nn.Parameter(torch.full((40,), 1.0, dtype=dtype))
    optimizer = pf.MaskedAdam([param], lr=2**-12, betas=(0.0, 0.0), eps=0.0, master_weights=True, backend=backend)
    param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    master = optimizer.state[param]["master_param"]
    assert torch.equal(master, torch.full((40,), 1 - 3 * 2**-12))
    with torch.no_grad():
        param[:10] = 5.0
        param[10:20] = 1.0
    optimizer.step()
    # If the parameter is still the master's rounded value, the master keeps its digits.
    rounded_to_one = master[20:].to(dtype) == 1
    assert torch.equal(master[:10], torch.full((10,), 5 - 2**-12))
    assert torch.equal(master[20:], torch.full((20,), 1 - 4 * 2**-12))
    assert dtype == torch.float16 or rounded_to_one.all()
    assert torch.equal(param, master.to(dtype))
    # The same holds after a change of memory, and if the state comes from a checkpoint.
    param.data = torch.full((40,), 3.0, dtype=dtype)
    optimizer.step()
    assert torch.equal(master, torch.full((40,), 3 - 2**-12))
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        param.fill_(7.0)
    fresh = pf.MaskedAdam([param], master_weights=True, backend=backend)
    fresh.load_state_dict(saved)
    fresh.step()
    assert torch.equal(fresh.state[param]["master_param"], torch.full((40,), 7 - 2**-12))


def test_writes_while_the_average_is_swapped_in():
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = pf.MaskedAdam([param], lr=2**-12, betas=(0.0, 0.0), eps=0.0, master_weights=True, ema_decay=0.5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.no_grad():
        param.fill_(2.0)
    with optimizer.swapped_ema():
        pass
    optimizer.step()
    assert torch.equal(optimizer.state[param]["master_param"], torch.full((4,), 2 - 2**-12))


# ---- gradients


def test_negated_views_as_gradients(backend):
    params = [
        nn.Parameter(torch.zeros(70)),
        nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    ]
    # Without momentum each step moves by lr.
    optimizer = pf.MaskedAdam(params, lr=LR, betas=(0.0, 0.0), backend=backend)
    for param in params:
        param.grad = torch._neg_view(torch.ones_like(param))
    forget = [torch._neg_view(torch.ones_like(param)) for param in params]
    optimizer.step()
    assert all(torch.allclose(p, torch.tensor(LR)) for p in params)
    optimizer.step(masked_grads=forget)
    assert all(torch.allclose(p, torch.tensor(2 * LR)) for p in params)
    accumulator = pf.SaliencyAccumulator(enumerate_named(params), backend=backend)
    accumulator.add()
    assert all((score == -1).all() for score in accumulator.scores.values())


def enumerate_named(params):
    return [(str(i), param) for i, param in enumerate(params)]


def test_a_negated_view_as_parameter(backend):
    values = torch.arange(6.0)
    param = nn.Parameter(torch._neg_view(values))
    assert param.is_neg()
    param.grad = torch.ones(6)
    pf.MaskedAdam([param], lr=LR, backend=backend).step()
    assert torch.allclose(param, -torch.arange(6.0) - LR)


def test_expanded_gradients(backend):
    param = nn.Parameter(torch.zeros(3, 40))
    param.grad = torch.tensor([[1.0], [-1.0], [1.0]]).expand(3, 40)
    pf.MaskedAdam([param], lr=LR, backend=backend).step()
    assert torch.allclose(param, -LR * param.grad)


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError


def test_a_subclass_with_its_own_dispatch_is_no_gradient():
    param = nn.Parameter(torch.zeros(3))
    optimizer = pf.MaskedAdam([param])
    wrapped = torch.Tensor._make_subclass(Subclass, torch.ones(3))
    with pytest.raises(TypeError, match="Subclass"):
        optimizer.step(masked_grads=[wrapped])
    assert not param.any()
