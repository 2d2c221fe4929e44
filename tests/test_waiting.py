"""Selections and steps never wait for a GPU, and a CUDA graph can capture all that they do. Needs no GPU.

The tests use tensors without memory; test_gpu.py tests the operators themselves.
"""

import warnings

import pytest
import torch
from torch import nn

import pecker_fast as pf

from .waiting import NoWaiting, no_gpu_to_wait_for

SHAPES = ((1,), (33,), (64, 3, 3, 3), (0,), (128, 257))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with no_gpu_to_wait_for(monkeypatch), warnings.catch_warnings():
        # Optimizers compare addresses, which these tensors do not have.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def tensors() -> dict[str, torch.Tensor]:
    return {str(i): torch.empty(shape, device="cuda") for i, shape in enumerate(SHAPES)}


@pytest.mark.parametrize(
    "what",
    [
        lambda x: x["0"].item(),
        lambda x: bool(x["0"] > 0),
        lambda x: x["1"][x["1"] > 0],
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x["1"].cpu(),
        lambda x: torch.nonzero(x["1"]),
        lambda x: torch.ones(3).to("cuda"),
    ],
    ids=["item", "bool", "mask", "tensor", "cpu", "nonzero", "to"],
)
def test_waiting_is_noticed(what):
    x = tensors()
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        what(x)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.3},
        {"density": [0.5, 0.3, 0.01], "ties": "all"},
        {"k": 7},
        {"threshold": 0.25},
        {"threshold": [0.25, 1e-3]},
        {"density": 0.3, "scope": "tensor"},
        {"threshold": 0.3, "scope": "tensor"},
        {"density": [0.3, 0.1], "relative_to": True},
        {"threshold": 0.3, "scope": "tensor", "relative_to": True},
    ],
    ids=str,
)
def test_selection(options):
    scores = tensors()
    if "relative_to" in options:
        options = {**options, "relative_to": tensors()}
    with NoWaiting():
        masks = pf.saliency_mask(scores, backend="cuda", **options)
    for mask in masks if isinstance(masks, list) else [masks]:
        assert mask.words.is_cuda and mask.words.shape == (sum(-(-t.numel() // 32) for t in scores.values()),)


def test_accumulation():
    params = {name: nn.Parameter(value) for name, value in tensors().items()}
    accumulator = pf.SaliencyAccumulator(params.items(), "sq_sum", backend="cuda")
    for param in params.values():
        param.grad = torch.empty_like(param)
    with NoWaiting():
        accumulator.add()
        accumulator.mask(density=0.5).apply_({name: param.grad for name, param in params.items()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.0, 0.9), "clip_value": 1.0, "ema_decay": 0.99},
        {"nonfinite": "skip", "ema_decay": 0.99},
        {"nonfinite": "zero", "capturable": True},
        {"amsgrad": True, "weight_decay": 0.1, "max_update": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["plain", "masked", "joint", "mixed"])
def test_steps(kind, options):
    params = {name: nn.Parameter(value) for name, value in tensors().items()}
    optimizer = pf.MaskedAdam(params.items(), lr=1e-2, backend="cuda", **options)
    mask = pf.saliency_mask(tensors(), density=0.3, backend="cuda")
    masked_grads = list(tensors().values())
    steps = {
        "plain": optimizer.step,
        "masked": lambda: optimizer.step(mask=mask),
        "joint": lambda: optimizer.step(mask=mask, masked_grads=masked_grads),
    }
    chosen = list(steps.values()) if kind == "mixed" else [steps[kind]]

    def run() -> None:
        for step in chosen:
            for param in params.values():
                param.grad = torch.empty_like(param)
            step()

    # The first steps fill the caches of later ones.
    run(), run()
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    with NoWaiting():
        run()
        del optimizer.grad_scale, optimizer.found_inf
        run()
