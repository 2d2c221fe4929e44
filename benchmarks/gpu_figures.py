"""Benchmarks that make sense on a GPU only: speed against its memory, launches, and Triton against CUDA.

They join the registry when they are imported.
"""

from collections.abc import Callable
from functools import partial

import torch

import pecker_fast as pf
from pecker_fast import ops

from .inputs import Problem
from .registry import (
    DENSITIES,
    EMA_DECAY,
    OURS,
    Case,
    Figure,
    adam_floor,
    gpu_only,
    masked_adam,
    masked_floor,
    register,
    torch_adam,
)
from .timing import launch_seconds, launches

CUDA = ("cuda",)
CLIP = 1.0


def _step(problem: Problem, beta1: float, *, density: float | None = None, joint: bool = False, **options):
    """A step of a separate MaskedAdam: plain, masked (``density``), or joint at density 0.5."""
    optimizer = masked_adam(problem, problem.parameters(problem.gradients(3)), beta1, **options)
    if joint:
        return partial(optimizer.step, mask=problem.mask(0.5), masked_grads=problem.gradients(4))
    return optimizer.step if density is None else partial(optimizer.step, mask=problem.mask(density))


# Name, description, buffers, arguments of _step, floor in bytes a parameter.
STEPS = (
    ("plain", "plain dense step", 24, {"beta1": 0.9}, lambda p: adam_floor(p, 2)),
    ("beta0", "plain, betas[0] = 0", 20, {"beta1": 0.0}, lambda p: adam_floor(p, 1)),
    ("ema", "plain with EMA", 28, {"beta1": 0.9, "ema_decay": EMA_DECAY}, lambda p: adam_floor(p, 2, ema=True)),
    ("joint", "joint, density 0.5", 36, {"beta1": 0.9, "joint": True}, lambda p: adam_floor(p, 2, joint=True)),
    (
        "joint_all",
        "joint, clip, EMA, betas[0] = 0",
        40,
        {"beta1": 0.0, "joint": True, "ema_decay": EMA_DECAY, "clip_value": CLIP},
        lambda p: adam_floor(p, 1, ema=True, joint=True),
    ),
    ("masked", "masked, density 0.5", 32, {"beta1": 0.9, "density": 0.5}, lambda p: masked_floor(p, 0.5, 2, False)),
    (
        "packed",
        "masked, density 0.5, packed",
        32,
        {"beta1": 0.9, "density": 0.5, "packed": True},
        lambda p: masked_floor(p, 0.5, 2, True),
    ),
)


def _register_share(name: str, description: str, buffers: float, options: dict, floor: Callable) -> None:
    @register(f"share_{name}", f"{description}: share of the copy bandwidth", buffers, CUDA)
    def build(problem: Problem) -> Case:
        figure = Figure(
            f"{description}: share of copy bandwidth",
            bar=gpu_only(problem, 0.85),
            aim=gpu_only(problem, 0.92),
            at_most=False,
            unit="",
            against_copy="share",
        )
        return Case({OURS: _step(problem, **options)}, [figure], {OURS: floor(problem)})


for entry in STEPS:
    _register_share(*entry)


@register("masked_speedup", "masked and packed steps against our own dense step", 120, CUDA)
def masked_speedup(problem: Problem) -> Case:
    """A masked step has dense moments like the dense step; packed moments are those of the mask's entries."""
    wanted = {(0.1, False): (1.2, 1.5), (0.01, False): (5.0, 6.0), (0.1, True): (1.2, 2.0), (0.01, True): (5.0, 8.0)}
    case = Case({"dense": _step(problem, 0.9)}, [], {"dense": adam_floor(problem, 2)})
    for (density, packed), targets in wanted.items():
        kind = "packed" if packed else "masked"
        name = f"{kind} {density}"
        case.functions[name] = _step(problem, 0.9, density=density, packed=packed)
        case.floors[name] = masked_floor(problem, density, 2, packed)
        bar, aim = (gpu_only(problem, value) for value in targets)
        case.figures.append(Figure(f"dense / {kind}, density {density}", "dense", name, bar, aim, at_most=False))
    return case


@register("fetch_granularity", "masked steps with DRAM read in 32 bytes at a time", 120, CUDA)
def fetch_granularity(problem: Problem) -> Case:
    """At density 0.1 half of the bytes of 64-byte fetches are not needed. The setting holds for the whole process."""
    before = ops.l2_fetch_granularity(problem.device)

    def with_granularity(size: int, step: Callable[[], object]) -> None:
        ops.l2_fetch_granularity(problem.device, size)
        step()

    case = Case({}, [])
    for density in (0.1, 0.01):
        step = _step(problem, 0.9, density=density)
        wide, narrow = f"masked {density}, as it is", f"masked {density}, 32 bytes"
        case.functions[wide] = partial(with_granularity, before, step)
        case.functions[narrow] = partial(with_granularity, 32, step)
        case.figures.append(Figure(f"masked, density {density}: fetches of 32 bytes / of {before}", narrow, wide))
        case.floors |= dict.fromkeys((wide, narrow), masked_floor(problem, density, 2, False))
    return case


@register("joint_rivals", "joint step with clip and EMA, betas[0] = 0, against separate passes", 110, CUDA)
def joint_rivals(problem: Problem) -> Case:
    """The rivals' way: multiply by a float mask, add, clip, fused Adam, foreach EMA."""
    mask = problem.float_mask(problem.mask(0.5))
    params = list(problem.parameters(problem.gradients(3)).values())
    grads, masked_grads = [param.grad for param in params], list(problem.gradients(4).values())
    fused = torch_adam(params, 0.0)
    values = [param.detach() for param in params]
    emas = [value.float().clone() for value in values]

    def separate_passes() -> None:
        torch._foreach_mul_(masked_grads, mask)
        torch._foreach_add_(grads, masked_grads)
        torch.nn.utils.clip_grad_value_(params, CLIP)
        fused.step()
        wide = values if problem.dtype == torch.float32 else [value.float() for value in values]
        torch._foreach_lerp_(emas, wide, 1 - EMA_DECAY)

    ours = _step(problem, 0.0, joint=True, ema_decay=EMA_DECAY, clip_value=CLIP)
    figure = Figure(
        "separate passes / joint step, clip and EMA",
        "separate passes",
        OURS,
        gpu_only(problem, 2.2),
        gpu_only(problem, 2.5),
        at_most=False,
    )
    floors = {OURS: adam_floor(problem, 1, ema=True, joint=True)}
    return Case({OURS: ours, "separate passes": separate_passes}, [figure], floors)


@register("launches", "kernels of a step, and its time on the CPU", 60, CUDA)
def step_launches(problem: Problem) -> Case:
    figures = []
    steps = {
        "plain step": _step(problem, 0.9),
        "masked step": _step(problem, 0.9, density=0.5),
        "joint step, clip and EMA": _step(problem, 0.0, joint=True, ema_decay=EMA_DECAY, clip_value=CLIP),
    }
    for name, step in steps.items():
        bar = partial(gpu_only, problem, size="cifar10")

        def microseconds(step=step) -> float:
            step()
            return 1e6 * launch_seconds(step, problem.device)

        figures.append(Figure(f"launches of a {name}", bar=bar(3), value=partial(launches, step), unit=" launches"))
        figures.append(Figure(f"CPU time of a {name}", bar=bar(100), value=microseconds, unit=" us"))
    return Case({}, figures)


def _on_backend(problem: Problem, backend: str) -> dict[str, Callable[[], object]]:
    """Every operation on one back end."""
    here = Problem(problem.size, problem.dtype, problem.device, backend)
    named = here.gradients()
    params = here.parameters(named)
    accumulator = pf.SaliencyAccumulator(params.items(), "sum", backend=backend)
    mask = here.mask(0.5)
    functions = {
        "saliency_mask": lambda: pf.saliency_mask(named, density=0.5, backend=backend),
        "accumulate": accumulator.add,
        "apply_mask": lambda: mask.apply_(named),
        "plain step": masked_adam(here, params, 0.9).step,
        "joint step": _step(here, 0.0, joint=True),
    }
    for density in DENSITIES:
        functions[f"masked step {density}"] = _step(here, 0.9, density=density)
        functions[f"packed step {density}"] = _step(here, 0.0, density=density, packed=True)
    return functions


@register("triton_over_cuda", "Triton against CUDA C++, each operation", 400, CUDA)
def triton_over_cuda(problem: Problem) -> Case:
    case = Case({}, [])
    for backend in ("triton", "cuda"):
        for name, function in _on_backend(problem, backend).items():
            case.functions[f"{name}, {backend}"] = function
            if backend == "cuda":
                bar = gpu_only(problem, 1.25, size="cifar10")
                case.figures.append(Figure(f"Triton / CUDA, {name}", f"{name}, triton", f"{name}, cuda", bar))
    return case
