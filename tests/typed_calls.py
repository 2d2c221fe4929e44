"""Calls as in user code, for the type checker (``make lint``); nothing here is run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pecker_fast as pf

if TYPE_CHECKING:
    from typing_extensions import assert_type


def masks(model: nn.Module, gradients: list[Tensor]) -> None:
    assert_type(pf.saliency_mask(model, density=0.1), pf.SaliencyMask)
    assert_type(pf.saliency_mask(gradients, k=100, scope="global", ties="all"), pf.SaliencyMask)
    assert_type(pf.saliency_mask({"a": gradients[0]}, threshold=0.5, backend="reference"), pf.SaliencyMask)
    assert_type(pf.saliency_mask(model, density=[0.1, 0.5]), list[pf.SaliencyMask])
    assert_type(pf.saliency_mask(gradients, k=[1, 2]), list[pf.SaliencyMask])
    assert_type(pf.saliency_mask(gradients, density=0.1, relative_to=model, damping=0.01), pf.SaliencyMask)
    mask = pf.SaliencyMask.load("mask.safetensors")
    assert_type(mask["weight"], Tensor)
    assert_type(mask.density, float)
    assert_type(mask | mask, pf.SaliencyMask)
    mask.save(Path("mask.safetensors"))


def steps(model: nn.Module, mask: pf.SaliencyMask) -> None:
    optimizer = pf.MaskedAdam(model.named_parameters(), lr=1e-3, betas=(0.0, 0.999), ema_decay=0.999)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.step(mask=mask, masked_grads=[torch.zeros(3)])
    with optimizer.swapped_ema():
        pass
    accumulator = pf.SaliencyAccumulator(model)
    accumulator.add()
    retained = pf.SaliencyAccumulator(model, "sq_sum")
    assert_type(accumulator.mask(density=0.1), pf.SaliencyMask)
    assert_type(accumulator.mask(k=[1], relative_to=retained.scores, damping=0.1), list[pf.SaliencyMask])


def runs() -> None:
    run = pf.unlearn("digits", method="pecker", forget=[0], cover=1, max_train_steps=20)
    assert_type(run, pf.Run)
    distilled = pf.distil("digits", max_train_steps=20, save_dtype="float16")
    assert_type(pf.unlearn("digits", "sfd", forget=3, distilled=distilled), pf.Run)
    assert_type(run.metrics, dict[str, Any])
    assert_type(run.mask, pf.SaliencyMask | None)
    assert_type(run.report, Path)
    assert_type(pf.evaluate(run), dict[str, Any])
    assert_type(pf.compare("digits", methods=["pecker", "sfd"], seeds=3), pf.Comparison)


def patches(run: pf.Run, model: nn.Module) -> None:
    patch = pf.make_patch(run, output="p.safetensors")
    assert_type(patch, pf.Patch)
    assert_type(pf.inspect_patch(Path("p.safetensors")).metadata, dict[str, Any])
    assert_type(patch.density, float)
    pf.make_patch(model, model.state_dict(), output="p.safetensors", dtype="base")
    assert_type(pf.apply_patch(model, "p.safetensors", "q.safetensors"), nn.Module | Path)
    assert_type(pf.revert_patch("folder", "p.safetensors", output="base"), str | Path)
    assert pf.verify_patch("p.safetensors", model) in ("base", "result")
    assert_type(pf.patch_mask("p.safetensors") | patch.mask(), pf.SaliencyMask)
