"""The benchmarks: for each operation its inputs, how it runs, its rivals, the bytes it must move, bar and aim.

Bars are results to reach, printed as met or missed by ``report.py``; no test depends on a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

import pecker_fast as pf

from .inputs import GRADIENT_KINDS, Problem
from .memory import extra_memory_share
from .selections import RIVALS, flat_magnitudes, rivals

OURS = "pecker_fast"
DENSITIES = (0.5, 0.1, 0.01)
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Figure:
    """One number of the table.

    ``numerator`` and ``denominator`` name functions of the case, timed in turns. ``at_most``: the number should be
    small. ``value`` replaces both if the number is not a ratio of times. ``against_copy``: the numerator is
    timed in turns with a large copy instead, and the number is the bandwidth of its floor bytes over that of the copy
    ("share"), or the time is divided by that of reading the parameters once at that bandwidth ("read").
    """

    name: str
    numerator: str = OURS
    denominator: str = OURS
    bar: float | None = None
    aim: float | None = None
    at_most: bool = True
    value: Callable[[], float] | None = None
    unit: str = "x"
    against_copy: Literal["share", "read"] | None = None


@dataclass
class Case:
    """An operation on one problem: named calls, the figures made from them, bytes a parameter each call must move."""

    functions: dict[str, Callable[[], object]]
    figures: list[Figure]
    floors: dict[str, float] = field(default_factory=dict)
    # On a GPU: launches and memory of each function, filled in once measured.
    counted: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """An entry of the registry. ``buffers``: about how many bytes a parameter all alternatives take together."""

    name: str
    description: str
    build: Callable[[Problem], Case]
    buffers: float
    devices: tuple[str, ...] = ("cpu", "cuda")


OPS: dict[str, Op] = {}


def register(name: str, description: str, buffers: float, devices: tuple[str, ...] = ("cpu", "cuda")):
    """Adds a function that makes a Case of a Problem to the registry."""

    def add(build: Callable[[Problem], Case]) -> Callable[[Problem], Case]:
        OPS[name] = Op(name, description, build, buffers, devices)
        return build

    return add


def touched(density: float, device: torch.device) -> float:
    """Share of memory sectors that an even mask touches: 32-byte ones on a GPU, 64-byte cache lines on a CPU."""
    return 1 - (1 - density) ** (8 if device.type == "cuda" else 16)


def adam_floor(problem: Problem, moments: int, *, ema: bool = False, joint: bool = False) -> float:
    """Bytes a parameter of a step that updates every entry: parameter and moments read and written, gradient read."""
    return 3 * problem.itemsize + 8 * moments + 8 * ema + joint * (problem.itemsize + 0.125)


def masked_floor(problem: Problem, density: float, moments: int, packed: bool) -> float:
    """Bytes a parameter of a masked step: mask read, and the sectors of parameter, gradient and moments it touches."""
    share = touched(density, problem.device)
    return 0.125 + 3 * problem.itemsize * share + 8 * moments * (density if packed else share)


def packed_floor(problem: Problem, density: float, moments: int) -> float:
    """The same with packed moments and gradients: of the parameter alone are sectors touched."""
    packed = density * (problem.itemsize + 8 * moments)
    return 0.125 + 2 * problem.itemsize * touched(density, problem.device) + packed


def fp32_only(problem: Problem, bar: float | None) -> float | None:
    """Bars are set for float32 on the CPU."""
    return bar if problem.dtype == torch.float32 and problem.device.type == "cpu" else None


def gpu_only(problem: Problem, bar: float | None, size: str = "sd15") -> float | None:
    """Bars of a GPU are set for float32 and one size."""
    wanted = problem.dtype == torch.float32 and problem.device.type == "cuda" and problem.size == size
    return bar if wanted else None


# ---- selection


@register("saliency_mask", "exact global top-k mask at density 0.5", buffers=40)
def saliency_mask(problem: Problem) -> Case:
    named = problem.gradients()
    grads = list(named.values())
    flat = flat_magnitudes(grads)
    functions = {
        OURS: lambda: pf.saliency_mask(named, density=0.5, backend=problem.backend),
        "torch.sum": flat.sum,
    }
    bar = partial(fp32_only, problem)
    figures = [Figure("saliency_mask / torch.sum", OURS, "torch.sum", bar(1.7), bar(1.4))]
    bars = {"numpy.partition": 10.0, "torch.kthvalue": 30.0, "argsort of argsort": 300.0}
    gpu_bars = {"torch.topk": 10.0, "torch.kthvalue": 20.0, "argsort of argsort": 100.0}
    if problem.device.type == "cuda":
        bar, bars = partial(gpu_only, problem), gpu_bars
        figures.append(
            Figure("saliency_mask / one read at copy bandwidth", bar=bar(1.6), aim=bar(1.2), against_copy="read")
        )
    for name, rival in rivals(problem.device, problem.dtype).items():
        functions[name] = partial(rival, grads, 0.5)
        figures.append(Figure(f"{name} / saliency_mask", name, OURS, bar(bars.get(name)), at_most=False))
    return Case(functions, figures, {OURS: problem.itemsize + 0.125, "torch.sum": problem.itemsize})


@register("saliency_mask_inputs", "the same on gradients that are hard on a selection", buffers=44)
def saliency_mask_inputs(problem: Problem) -> Case:
    def run(grads: dict[str, Tensor]) -> Callable[[], object]:
        return lambda: pf.saliency_mask(grads, density=0.5, backend=problem.backend)

    functions = {kind: run(problem.gradients(kind=kind)) for kind in GRADIENT_KINDS}
    kinds = [kind for kind in GRADIENT_KINDS if kind != "normal"]
    figures = [Figure(f"{kind} / normal gradients", kind, "normal", 3.0) for kind in kinds]
    return Case(functions, figures, dict.fromkeys(GRADIENT_KINDS, problem.itemsize + 0.125))


@register("saliency_mask_densities", "masks of five densities at once", buffers=10)
def saliency_mask_densities(problem: Problem) -> Case:
    named = problem.gradients()
    densities = [0.5, 0.3, 0.1, 0.05, 0.01]

    def one_by_one() -> None:
        for density in densities:
            pf.saliency_mask(named, density=density, backend=problem.backend)

    functions = {
        OURS: lambda: pf.saliency_mask(named, density=densities, backend=problem.backend),
        "one call each": one_by_one,
        "one density": lambda: pf.saliency_mask(named, density=0.5, backend=problem.backend),
    }
    figures = [
        Figure("five densities, one call / five calls", OURS, "one call each"),
        Figure("five densities / one", OURS, "one density", fp32_only(problem, 1.6)),
    ]
    return Case(functions, figures, {OURS: problem.itemsize + 0.625, "one density": problem.itemsize + 0.125})


@register("saliency_mask_threshold", "mask of a threshold that is given", buffers=8)
def saliency_mask_threshold(problem: Problem) -> Case:
    named = problem.gradients()
    threshold = pf.saliency_mask(named, density=0.5, backend=problem.backend).threshold
    functions = {
        OURS: lambda: pf.saliency_mask(named, threshold=threshold, backend=problem.backend),
        "density": lambda: pf.saliency_mask(named, density=0.5, backend=problem.backend),
    }
    figures = [Figure("threshold / density", OURS, "density", fp32_only(problem, 1.0))]
    return Case(functions, figures, dict.fromkeys(functions, problem.itemsize + 0.125))


@register("saliency_mask_relative", "mask of the quotients of two tensors' magnitudes", buffers=44)
def saliency_mask_relative(problem: Problem) -> Case:
    named, others = problem.gradients(), problem.gradients(seed=1)
    scores, retained = list(named.values()), list(others.values())

    def quotients() -> list[Tensor]:
        made = []
        for score, other in zip(scores, retained, strict=True):
            denominator = other.abs().float()
            denominator += 0.01 * denominator.mean()
            made.append(score.abs().float().div_(denominator))
        return made

    def run(select: Callable[[list[Tensor], float], object]) -> Callable[[], object]:
        return lambda: select(quotients(), 0.1)

    functions = {
        OURS: lambda: pf.saliency_mask(named, density=0.1, relative_to=others, backend=problem.backend),
        "plain": lambda: pf.saliency_mask(named, density=0.1, backend=problem.backend),
        # A quotient needs the mean first, so one tensor is read once and the other twice.
        "three reads": lambda: [tensor.sum() for tensors in (scores, retained, retained) for tensor in tensors],
        "expression, saliency_mask": run(lambda made, density: pf.saliency_mask(made, density=density)),
        "expression, torch.topk": run(RIVALS["torch.topk"]),
        "expression, torch.kthvalue": run(RIVALS["torch.kthvalue"]),
    }
    figures = [
        Figure("relative / plain", OURS, "plain", fp32_only(problem, 1.5)),
        Figure("relative / torch.sum of what is read", OURS, "three reads"),
        *[
            Figure(f"{name} / relative", name, OURS, at_most=False)
            for name in functions
            if name.startswith("expression")
        ],
    ]
    return Case(functions, figures, {OURS: 3 * problem.itemsize + 0.125, "plain": problem.itemsize + 0.125})


@register("saliency_mask_memory", "peak memory of a selection beyond the gradients and the mask", buffers=0)
def saliency_mask_memory(problem: Problem) -> Case:
    figures = [
        Figure(
            "extra memory of a selection / gradients",
            bar=0.06,
            value=partial(extra_memory_share, problem, OURS),
            unit="",
        )
    ]
    for name in rivals(problem.device, problem.dtype):
        value = partial(extra_memory_share, problem, name)
        figures.append(Figure(f"the same of {name}", value=value, unit=""))
    return Case({}, figures)


@register("mask_size", "bytes of a mask", buffers=10)
def mask_size(problem: Problem) -> Case:
    def value() -> float:
        return problem.mask(0.5).words.nbytes / problem.numel

    return Case({}, [Figure("mask bytes a parameter", bar=0.125 * 1.01, value=value, unit=" B")])


@register("accumulate", "SaliencyAccumulator.add()", buffers=24)
def accumulate(problem: Problem) -> Case:
    params = problem.parameters(problem.gradients())
    grads = [param.grad for param in params.values()]
    sums = [torch.zeros_like(grad, dtype=torch.float32) for grad in grads]
    signed = pf.SaliencyAccumulator(params.items(), "sum", backend=problem.backend)
    squared = pf.SaliencyAccumulator(params.items(), "sq_sum", backend=problem.backend)

    def foreach_add() -> None:
        torch._foreach_add_(sums, grads)

    def foreach_addcmul() -> None:
        wide = grads if problem.dtype == torch.float32 else [grad.float() for grad in grads]
        torch._foreach_addcmul_(sums, wide, wide)

    functions = {
        OURS: signed.add,
        f"{OURS} squared": squared.add,
        "foreach add": foreach_add,
        "foreach addcmul": foreach_addcmul,
    }
    figures = [
        Figure('accumulate "sum" / foreach add', OURS, "foreach add"),
        Figure('accumulate "sq_sum" / foreach addcmul', f"{OURS} squared", "foreach addcmul"),
    ]
    floor = 8 + problem.itemsize
    return Case(functions, figures, {OURS: floor, f"{OURS} squared": floor, "foreach add": floor})


@register("apply_mask", "SaliencyMask.apply_() on gradients", buffers=16)
def apply_mask(problem: Problem) -> Case:
    named = problem.gradients()
    grads = list(named.values())
    mask = problem.mask(0.5)
    float_mask = problem.float_mask(mask)
    functions = {
        OURS: lambda: mask.apply_(named),
        "foreach mul": lambda: torch._foreach_mul_(grads, float_mask),
    }
    floors = {OURS: 2 * problem.itemsize + 0.125, "foreach mul": 3 * problem.itemsize}
    return Case(functions, [Figure("apply_ / foreach mul by a float mask", OURS, "foreach mul")], floors)


# ---- steps


def torch_adam(params: list[nn.Parameter], beta1: float, **options) -> torch.optim.Adam:
    return torch.optim.Adam(params, lr=1e-4, betas=(beta1, 0.999), **(options or {"fused": True}))


def masked_adam(problem: Problem, params: dict[str, nn.Parameter], beta1: float, **options) -> pf.MaskedAdam:
    return pf.MaskedAdam(params.items(), lr=1e-4, betas=(beta1, 0.999), backend=problem.backend, **options)


def other_fused_adams() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Fused Adams of other libraries that are installed."""
    rivals = {}
    if find_spec("apex") and find_spec("apex.optimizers"):
        from apex.optimizers import FusedAdam

        rivals["apex FusedAdam"] = FusedAdam
    if find_spec("transformer_engine"):
        from transformer_engine.pytorch.optimizers import FusedAdam

        rivals["TransformerEngine FusedAdam"] = FusedAdam
    return rivals


@register("masked_adam", "plain dense step", buffers=88)
def dense_step(problem: Problem) -> Case:
    grads = problem.gradients()
    ours = masked_adam(problem, problem.parameters(grads), 0.9)
    functions = {
        OURS: ours.step,
        "torch fused": torch_adam(list(problem.parameters(grads).values()), 0.9).step,
    }
    bar = fp32_only(problem, 1.05)
    figures = [Figure("MaskedAdam.step() / torch fused", OURS, "torch fused", bar)]
    if problem.device.type == "cuda":
        functions["torch foreach"] = torch_adam(list(problem.parameters(grads).values()), 0.9, foreach=True).step
        figures.append(Figure("MaskedAdam.step() / torch foreach", OURS, "torch foreach"))
        for name, make in other_fused_adams().items():
            functions[name] = make(list(problem.parameters(grads).values()), lr=1e-4).step
            figures.append(Figure(f"MaskedAdam.step() / {name}", OURS, name))
    return Case(functions, figures, {OURS: adam_floor(problem, 2), "torch fused": 7 * problem.itemsize})


@register("masked_adam_beta0", "plain dense step with betas[0] = 0, without and with EMA", buffers=80)
def beta0_step(problem: Problem) -> Case:
    grads = problem.gradients()
    bar = partial(fp32_only, problem)
    plain = masked_adam(problem, problem.parameters(grads), 0.0)
    with_ema = masked_adam(problem, problem.parameters(grads), 0.0, ema_decay=EMA_DECAY)
    params = list(problem.parameters(grads).values())
    fused = torch_adam(params, 0.0)
    emas = [param.detach().float().clone() for param in params]
    values = [param.detach() for param in params]

    def fused_and_ema() -> None:
        fused.step()
        wide = values if problem.dtype == torch.float32 else [value.float() for value in values]
        torch._foreach_lerp_(emas, wide, 1 - EMA_DECAY)

    functions = {
        OURS: plain.step,
        f"{OURS} with EMA": with_ema.step,
        "torch fused": fused.step,
        "torch fused, foreach lerp": fused_and_ema,
    }
    figures = [
        Figure("betas[0] = 0 / torch fused", OURS, "torch fused", bar(0.80), bar(0.73)),
        Figure(
            "betas[0] = 0 and EMA / torch fused and foreach lerp",
            f"{OURS} with EMA",
            "torch fused, foreach lerp",
            bar(0.80),
            bar(0.72),
        ),
    ]
    floors = {OURS: adam_floor(problem, 1), f"{OURS} with EMA": adam_floor(problem, 1, ema=True)}
    return Case(functions, figures, {**floors, "torch fused": 7 * problem.itemsize})


@register("masked_adam_packed", "masked step, packed state and gradients, betas[0] = 0", buffers=72)
def packed_step(problem: Problem) -> Case:
    grads = problem.gradients()
    params = problem.parameters(grads)
    bars = {0.5: (0.85, 0.70), 0.1: (0.55, 0.45), 0.01: (0.30, 0.15)}
    fused = torch_adam(list(problem.parameters(grads).values()), 0.0)
    case = Case({"torch fused": fused.step}, [], {"torch fused": 7 * problem.itemsize})
    for density in DENSITIES:
        optimizer = masked_adam(problem, params, 0.0, packed=True)
        name = f"{OURS} {density}"
        case.functions[name] = partial(optimizer.step, mask=problem.mask(density))
        bar, aim = (fp32_only(problem, value) for value in bars[density])
        case.figures.append(Figure(f"packed, density {density} / torch fused", name, "torch fused", bar, aim))
        case.floors[name] = masked_floor(problem, density, 1, packed=True)
    density = 0.05
    optimizer = masked_adam(problem, problem.parameters(problem.gradients(5)), 0.0, packed=True)
    pf.pack_gradients(optimizer, problem.mask(density))
    name = f"{OURS} {density}, packed gradients"
    case.functions[name] = optimizer.step
    bar, aim = fp32_only(problem, 0.35), fp32_only(problem, 0.25)
    figure = f"packed, density {density}, packed gradients / torch fused"
    case.figures.append(Figure(figure, name, "torch fused", bar, aim))
    case.floors[name] = packed_floor(problem, density, 1)
    return case


@register("masked_adam_masked", "masked step, dense state", buffers=80)
def masked_step(problem: Problem) -> Case:
    """The rival multiplies gradients by a float mask and takes a dense step (which moves frozen entries)."""
    grads = problem.gradients()
    own_grads = list(problem.gradients().values())
    params = problem.parameters(grads)
    rival_params = problem.parameters(dict(zip(grads, own_grads, strict=True)))
    fused = torch_adam(list(rival_params.values()), 0.9)
    case = Case({}, [])
    for density in DENSITIES:
        mask = problem.mask(density)
        float_mask = problem.float_mask(mask)
        optimizer = masked_adam(problem, params, 0.9)

        def multiply_and_step(float_mask=float_mask) -> None:
            torch._foreach_mul_(own_grads, float_mask)
            fused.step()

        ours, rival = f"{OURS} {density}", f"foreach mul, torch fused {density}"
        case.functions |= {ours: partial(optimizer.step, mask=mask), rival: multiply_and_step}
        case.figures.append(Figure(f"masked, density {density} / foreach mul and torch fused", ours, rival))
        case.floors[ours] = masked_floor(problem, density, 2, packed=False)
    return case


@register("masked_adam_joint", "joint step: a gradient everywhere, and a second one where salient", buffers=100)
def joint_step(problem: Problem) -> Case:
    grads, masked_grads = problem.gradients(3), problem.gradients(4)
    mask = problem.mask(0.5)
    float_mask = problem.float_mask(mask)
    bar = partial(fp32_only, problem)
    # The rival adds to its gradients in place, so it has its own.
    rival_params = problem.parameters(problem.gradients(3))
    rival_grads = [param.grad for param in rival_params.values()]
    rival_masked = list(problem.gradients(4).values())
    fused = torch_adam(list(rival_params.values()), 0.9)

    def multiply_add_step() -> None:
        torch._foreach_mul_(rival_masked, float_mask)
        torch._foreach_add_(rival_grads, rival_masked)
        fused.step()

    def addcmul_step() -> None:
        torch._foreach_addcmul_(rival_grads, rival_masked, float_mask)
        fused.step()

    step = masked_adam(problem, problem.parameters(grads), 0.9).step
    step0 = masked_adam(problem, problem.parameters(grads), 0.0).step
    functions = {
        OURS: partial(step, mask=mask, masked_grads=masked_grads),
        f"{OURS} betas[0] = 0": partial(step0, mask=mask, masked_grads=masked_grads),
        "mul, add, torch fused": multiply_add_step,
        "addcmul, torch fused": addcmul_step,
    }
    rival = "mul, add, torch fused"
    figures = [
        Figure("joint / mul, add, torch fused", OURS, rival, bar(0.70), bar(0.63)),
        Figure("joint, betas[0] = 0 / the same", f"{OURS} betas[0] = 0", rival, bar(0.55), bar(0.48)),
        Figure("joint / addcmul, torch fused", OURS, "addcmul, torch fused"),
    ]
    floors = {OURS: adam_floor(problem, 2, joint=True), f"{OURS} betas[0] = 0": adam_floor(problem, 1, joint=True)}
    return Case(functions, figures, floors)
