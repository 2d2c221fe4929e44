"""Inputs that MaskedAdam refuses before anything changes; and how masks and gradients are matched to parameters."""

import copy

import pytest
import torch
from torch import nn

import pecker_fast as pf
from tests.inputs import same_bits
from tests.optim_oracle import make_grads, set_grads

OPTIONS = [
    ({"clip_value": 0.0}, ValueError, "clip_value is 0.0"),
    ({"clip_value": "1"}, ValueError, "clip_value is '1'"),
    ({"max_update": -1.0}, ValueError, "max_update is -1.0"),
    ({"ema_decay": 1.5}, ValueError, r"ema_decay is 1.5.*\[0, 1\]"),
    ({"ema_decay": -0.1}, ValueError, "ema_decay is -0.1"),
    ({"variance": "both"}, ValueError, "variance is 'both'.*'combined', 'retain'"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite is 'ignore'.*'propagate', 'skip', 'zero', 'raise'"),
    ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
    ({"seed": 1.5}, ValueError, "seed is 1.5"),
    ({"seed": 2**70}, ValueError, "seed"),
    ({"master_weights": True, "stochastic_rounding": True}, ValueError, "choose one"),
    ({"differentiable": True}, ValueError, "differentiable"),
    ({"lr": "0.1"}, TypeError, "lr|str"),
]


@pytest.mark.parametrize("options, error, message", OPTIONS)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        pf.MaskedAdam([nn.Parameter(torch.ones(3))], **options)


@pytest.mark.parametrize(
    "param, message",
    [
        (torch.ones(3, dtype=torch.complex64), "complex"),
        (torch.ones(3).to_sparse(), "sparse"),
        (torch.ones(3, dtype=torch.float8_e4m3fn), "float8"),
    ],
)
def test_refused_parameters(param, message):
    good = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=message):
        pf.MaskedAdam([good, param.requires_grad_()])
    optimizer = pf.MaskedAdam([good])
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_groups_may_not_differ_in_shared_options():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    for option in ({"packed": True}, {"nonfinite": "skip"}, {"seed": 3}, {"ema_decay": 0.5}):
        with pytest.raises(ValueError, match=next(iter(option))):
            pf.MaskedAdam([{"params": params[:1]}, {"params": params[1:], **option}])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


def fill(module: nn.Module) -> nn.Module:
    set_grads(list(module.parameters()), make_grads(list(module.parameters())))
    return module


def unchanged(module: nn.Module, optimizer: pf.MaskedAdam, call, error, message: str) -> None:
    """``call`` raises and touches neither parameters nor state; the optimizer still works afterwards."""
    before = copy.deepcopy(([p.detach() for p in module.parameters()], optimizer.state_dict()))
    with pytest.raises(error, match=message):
        call()
    assert all(same_bits(p.detach(), b) for p, b in zip(module.parameters(), before[0], strict=True))
    now, old = ({i: s for i, s in d["state"].items() if s} for d in (optimizer.state_dict(), before[1]))
    assert now.keys() == old.keys()
    for i, state in old.items():
        assert state.keys() == now[i].keys() and all(torch.equal(now[i][key], value) for key, value in state.items())


@pytest.fixture(params=["first", "later"])
def stepped(request):
    """A module with gradients and its optimizer, before its first step and after one."""
    module = fill(net())
    optimizer = pf.MaskedAdam(module.named_parameters(), ema_decay=0.9)
    if request.param == "later":
        optimizer.step(mask=pf.saliency_mask(module, density=0.5))
        fill(module)
    return module, optimizer


def test_masks_of_other_models(stepped):
    module, optimizer = stepped
    other = pf.saliency_mask(fill(nn.Linear(4, 5)), density=0.5)
    reshaped = pf.saliency_mask({n: torch.randn(p.numel()) for n, p in module.named_parameters()}, density=0.5)
    short = pf.saliency_mask([torch.randn(4, 5)], density=0.5)
    for mask, message in ((other, "another model"), (reshaped, "shape"), (short, "1 tensors without names")):
        unchanged(module, optimizer, lambda mask=mask: optimizer.step(mask=mask), ValueError, message)
        joint = {"mask": mask, "masked_grads": make_grads(list(module.parameters()))}
        unchanged(module, optimizer, lambda joint=joint: optimizer.step(**joint), ValueError, message)
    for wrong in (torch.ones(3), {"a": 1}, "mask"):
        unchanged(module, optimizer, lambda wrong=wrong: optimizer.step(mask=wrong), TypeError, "SaliencyMask")
    optimizer.step(mask=pf.saliency_mask(module, density=0.5))


def test_mask_on_another_device(stepped):
    module, optimizer = stepped
    mask = pf.saliency_mask(module, density=0.5)
    mask._words = mask._words.to("meta")
    unchanged(module, optimizer, lambda: optimizer.step(mask=mask), ValueError, "mask is on meta.*cpu")


def test_wrong_gradients(stepped):
    module, optimizer = stepped
    params = list(module.parameters())
    good = make_grads(params)
    cases = [
        (good[:-1], ValueError, "masked_grads has 3 entries, the optimizer 4"),
        (torch.randn(3), TypeError, "masked_grads is one tensor"),
        ([*good[:-1], good[-1].double()], ValueError, r"masked_grads of parameter 1.bias.*float64"),
        ([*good[:-1], torch.randn(7)], ValueError, r"masked_grads of parameter 1.bias.*\(7,\)"),
        ([*good[:-1], good[-1].to("meta")], ValueError, "meta"),
        ([*good[:-1], good[-1].to_sparse()], RuntimeError, "sparse"),
        ([*good[:-1], 3.0], TypeError, "float"),
        ({"1.weight": good[2], "2.weight": good[0]}, ValueError, r"2.weight"),
        ({nn.Parameter(torch.ones(3)): torch.ones(3)}, ValueError, "does not have"),
    ]
    for wrong, error, message in cases:
        unchanged(module, optimizer, lambda wrong=wrong: optimizer.step(masked_grads=wrong), error, message)


def test_sparse_gradients():
    embedding = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = pf.MaskedAdam(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    unchanged(embedding, optimizer, optimizer.step, RuntimeError, "sparse")


# ---- alignment


def outcome(mask, module, *, names: bool = True, order: int = 1) -> list[torch.Tensor]:
    """The entries of the module's parameters that a masked step moves."""
    params = list(module.named_parameters() if names else module.parameters())[::order]
    optimizer = pf.MaskedAdam(params, lr=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    fill(module)
    optimizer.step(mask=mask)
    return [p.detach() != b for p, b in zip(module.parameters(), before, strict=True)]


def test_alignment_by_identity_name_and_order():
    module = fill(net())
    mask = pf.saliency_mask(module, density=0.4)
    expected = [mask[i] for i in range(4)]
    same = lambda moved: all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))  # noqa: E731
    assert same(outcome(mask, module, names=False, order=-1)), "by identity"
    twin = copy.deepcopy(module)
    assert same(outcome(mask, twin, order=-1)), "by name"
    wrapped = nn.DataParallel(twin)
    assert same(outcome(mask, wrapped, order=-1)), "by name with a prefix"
    assert same(outcome(mask, torch.compile(wrapped), order=-1)), "by name with two prefixes"
    prefixed = pf.SaliencyMask(mask.words, mask.shapes, [f"_orig_mod.module.{name}" for name in mask.names])
    assert same(outcome(prefixed, twin)), "by the mask's name with prefixes"
    assert same(outcome(pf.SaliencyMask(mask.words, mask.shapes), twin, names=False)), "by order"
    with pytest.raises(ValueError, match=r"named_parameters\(\)"):
        outcome(mask, twin, names=False)


def test_a_mask_of_more_parameters_than_the_optimizer_has():
    module = fill(net())
    mask = pf.saliency_mask(module, density=0.4)
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = pf.MaskedAdam(list(module[1].parameters()), lr=0.1)
    optimizer.step(mask=mask)
    moved = [p.detach() != b for p, b in zip(module.parameters(), before, strict=True)]
    assert not moved[0].any() and not moved[1].any()
    assert torch.equal(moved[2], mask["1.weight"]) and torch.equal(moved[3], mask["1.bias"])


def test_masked_grads_by_name_and_by_parameter():
    results = []
    module = fill(net())
    forget = make_grads(list(module.parameters()))
    forget[1] = None
    mask = pf.saliency_mask(module, density=0.5)
    for form in ("list", "names", "prefixed names", "parameters", "generator"):
        twin = copy.deepcopy(module)
        for p, q in zip(twin.parameters(), module.parameters(), strict=True):
            p.grad = q.grad.clone()
        named = dict(zip((n for n, _ in twin.named_parameters()), forget, strict=True))
        masked_grads = {
            "list": forget,
            "names": {n: g for n, g in named.items() if g is not None},
            "prefixed names": {f"module.{n}": g for n, g in named.items()},
            "parameters": {p: g for p, g in zip(twin.parameters(), forget, strict=True) if g is not None},
            "generator": (g for g in forget),
        }[form]
        pf.MaskedAdam(twin.named_parameters(), lr=0.1).step(mask=mask, masked_grads=masked_grads)
        results.append([p.detach() for p in twin.parameters()])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_alternating_masks_and_a_mask_replaced_by_an_equal_one():
    # Bindings are cached by mask object: a new mask may get the address of a dead one.
    param = nn.Parameter(torch.zeros(64))
    optimizer = pf.MaskedAdam([param], lr=0.1, betas=(0.0, 0.9))
    for _ in range(30):
        bits = torch.rand(64) < 0.5
        before = param.detach().clone()
        param.grad = torch.randn(64)
        optimizer.step(mask=pf.SaliencyMask.from_bool([bits]))
        assert torch.equal(param.detach() != before, bits)
