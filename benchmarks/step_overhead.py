"""CPU cost of a step apart from its kernel: many tensors of a few entries, like a network's biases and norms."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

import pecker_fast as pf

from .inputs import Problem
from .registry import OURS, Case, Figure, register, torch_adam
from .timing import cpu_seconds

TENSORS = 329  # of PECKER's CIFAR-10 network
ENTRIES = 4


def _parameters(problem: Problem) -> dict[str, nn.Parameter]:
    params = {f"block.{i}.weight": torch.randn(ENTRIES, dtype=problem.dtype) for i in range(TENSORS)}
    params = {name: nn.Parameter(value.to(problem.device)) for name, value in params.items()}
    for param in params.values():
        param.grad = torch.randn_like(param)
    return params


@register("step_overhead", f"CPU time of a step of {TENSORS} tensors of {ENTRIES} entries", buffers=1)
def step_overhead(problem: Problem) -> Case:
    def optimizer(**options) -> pf.MaskedAdam:
        return pf.MaskedAdam(_parameters(problem).items(), lr=1e-4, backend=problem.backend, **options)

    masked_grads = {name: param.grad for name, param in _parameters(problem).items()}
    mask = pf.saliency_mask(masked_grads, density=0.5)
    packed = optimizer(packed=True, betas=(0.0, 0.999))
    functions: dict[str, Callable[[], object]] = {
        OURS: optimizer().step,
        f"{OURS} masked": partial(optimizer().step, mask=mask),
        f"{OURS} joint": partial(optimizer().step, mask=mask, masked_grads=masked_grads),
        f"{OURS} packed": partial(packed.step, mask=mask),
        "torch fused": torch_adam(list(_parameters(problem).values()), 0.9).step,
        "torch foreach": torch_adam(list(_parameters(problem).values()), 0.9, foreach=True).step,
    }
    seconds = cache(partial(cpu_seconds, functions, problem.device))
    # These bars hold for the machine on which they were set. The ratios hold anywhere.
    bars = {OURS: 150.0, f"{OURS} joint": 200.0}

    def microseconds(name: str) -> float:
        return 1e6 * seconds()[name]

    figures = [
        Figure(f"CPU time of a step: {name}", bar=bars.get(name), value=partial(microseconds, name), unit=" us")
        for name in functions
    ]
    figures += [
        Figure(f"CPU time of a step / {rival}", value=lambda rival=rival: seconds()[OURS] / seconds()[rival])
        for rival in ("torch fused", "torch foreach")
    ]
    return Case(functions, figures)
