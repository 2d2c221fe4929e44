"""MaskedAdam under distributed checkpoints, wrapped models and Accelerate, and masks that are set before the step."""

import copy
import math

import pytest
import torch
from torch import nn

import pecker_fast as pf
from tests.test_optim_edits import LR, ones


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "amsgrad": True}])
def test_distributed_checkpoint_of_whole_parameters(options, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = nn.Linear(3, 2)
    optimizer = pf.MaskedAdam(model.named_parameters(), lr=1e-2, **options)
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    expected = copy.deepcopy(optimizer.state_dict()["state"])
    model.zero_grad()
    other = pf.MaskedAdam(model.named_parameters(), lr=1e-2, **options)
    other.state_dict()
    held = {"optim": get_optimizer_state_dict(model, other)}
    dcp.load(held, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, other, held["optim"])
    loaded = other.state_dict()["state"]
    for i, state in expected.items():
        assert loaded[i].keys() == state.keys()
        assert all(torch.equal(loaded[i][key], value) for key, value in state.items())


class Nested(nn.Module):
    """A parameter `weight` and a child called `module` with a `weight` of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.module = nn.Module()
        self.module.weight = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_names_are_matched_exactly_first(prefix):
    model = Nested()
    mask = pf.SaliencyMask.from_bool({"weight": torch.ones(2).bool(), "module.weight": torch.zeros(2).bool()})
    named = [(prefix + name, param) for name, param in model.named_parameters()]
    for order in (1, -1):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = pf.MaskedAdam(named[::order], lr=LR)
        for param in model.parameters():
            param.grad = torch.ones(2)
        optimizer.step(mask=mask)
        assert torch.allclose(model.weight, before[0] - LR) and torch.equal(model.module.weight, before[1])
        optimizer.step(masked_grads={"weight": torch.full((2,), -5.0)})
        assert (model.weight > before[0] - LR).all() and (model.module.weight < before[1]).all()


def test_names_that_could_mean_several_are_refused():
    params = {name: ones(1)[0] for name in ("a", "module._orig_mod.b", "c")}
    mask = pf.SaliencyMask.from_bool({n: torch.ones(2).bool() for n in ("a", "module.b", "_orig_mod.b", "x")})
    with pytest.raises(ValueError, match=r"module._orig_mod.b could be module.b or _orig_mod.b"):
        pf.MaskedAdam(params.items()).step(mask=mask)
    mask = pf.SaliencyMask.from_bool({n: torch.ones(2).bool() for n in ("a", "module.b", "x")})
    with pytest.raises(ValueError, match=r"no tensor for parameter c"):
        pf.MaskedAdam(params.items()).step(mask=mask)


def test_a_mask_set_beforehand():
    params = ones(2)
    mask = pf.SaliencyMask.from_bool([torch.tensor([True, False]), torch.tensor([False, True])])
    optimizer = pf.MaskedAdam(params, lr=LR, betas=(0.0, 0.9))
    with pytest.raises(TypeError, match="SaliencyMask"):
        optimizer.set_mask([True])
    optimizer.set_mask(mask)
    for _ in range(2):
        optimizer.step()
    assert torch.allclose(params[0], torch.tensor([-2 * LR, 0.0]), atol=1e-6)
    # An argument replaces the set mask for its step.
    optimizer.step(mask=~mask)
    assert torch.allclose(params[0], torch.tensor([-2 * LR, -LR]), atol=1e-6)
    # Gradients that were set hold for one step.
    optimizer.set_mask(mask, masked_grads=[torch.full((2,), -math.inf)] * 2)
    for param in params:
        param.grad = torch.zeros(2)
    optimizer.step()
    assert params[0].isnan().tolist() == [True, False] and not params[0][1].isinf()
    before = params[1].detach().clone()
    optimizer.set_mask(None)
    for param in params:
        param.grad = torch.ones(2)
    optimizer.step()
    assert params[1][0] < before[0]


def test_accelerate_takes_the_mask_that_was_set():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(3, 2, bias=False)
    optimizer = pf.MaskedAdam(model.parameters(), lr=LR)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    before = model.weight.detach().clone()
    accelerator.backward(prepared_model(torch.ones(4, 3)).sum())
    mask = pf.saliency_mask(model, k=2)
    optimizer.set_mask(mask)
    prepared.step()
    assert torch.equal(model.weight != before, mask[0])
    forget = [torch.ones(2, 3)]
    optimizer.set_mask(mask, masked_grads=forget)
    prepared.step()
    assert (model.weight != before).all()
