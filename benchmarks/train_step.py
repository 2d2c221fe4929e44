"""An iteration of the trainer against a plain-PyTorch one: time, images per second, memory, FLOP utilisation, phases.

``python -m pecker_fast.benchmarks.train_step --arch cifar10 stl10 --json out.json``; needs no data and no checkpoint.
Each row is a method in one precision, with and without ``torch.compile`` and CUDA graphs, timed in turns with the rival
(``step_rival``) in the same precision and with SFD computed in the same way.
"""

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecker_fast.profiling import Regions

from .memory import peak_growth
from .run import check_choice, conditions, save
from .step_flops import iteration_flops, matmul_rate, named_peak
from .step_problem import ARCHITECTURES, METHODS, PRECISIONS, Iteration, Problem, precision
from .step_report import text_table
from .step_rival import Rival
from .timing import Timing, interleave, median_of_ratios, ratio_of_medians

FORMAT_VERSION = 1
# The rival has no autocast: bf16 is measured against torch's default.
RIVAL_PRECISION = {"fp32": "fp32", "tf32": "tf32", "default": "default", "bf16": "default"}
# Regions of the optimizer's side of an iteration; the average is part of the optimizer's pass.
OPTIMIZER_SIDE = ("optimizer", "selection")
# bf16, and equal precision; pecker over sfd; the optimizer's side; memory over the rival's.
BARS = {"bf16": 3.0, "bf16 aim": 4.0, "equal": 1.5, "pecker": 1.05, "optimizer": 0.03, "memory": 0.6}


@dataclass(frozen=True)
class Variant:
    """How an iteration is computed."""

    precision: str
    compile: bool = False
    cuda_graphs: bool = False
    split_batches: bool = False

    @property
    def name(self) -> str:
        switches = {"compile": self.compile, "graphs": self.cuda_graphs, "split": self.split_batches}
        return " ".join([self.precision, *(word for word, on in switches.items() if on)])

    def options(self, method: str, density: float = 0.5) -> dict[str, Any]:
        """Options of the method that the variant sets."""
        options: dict[str, Any] = {"cuda_graphs": self.cuda_graphs, "split_batches": self.split_batches}
        return options if method == "sfd" else {**options, "density": density}


def blocks(iteration: Callable[[], dict[str, Tensor]], count: int) -> Callable[[], None]:
    """``count`` iterations as in the training loop: without waiting in between, and with masks when they are due."""

    def run() -> None:
        for _ in range(count):
            iteration()

    return run


def measured_memory(device: torch.device, work: Callable[[], Any]) -> tuple[Any, int]:
    """The result of ``work``, and the peak of memory beyond the memory in use before."""
    if device.type != "cuda":
        return peak_growth(work)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def compiled_graphs() -> int:
    """Number of graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    """Number of graph breaks of torch.compile in this process."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def phases(iteration: Iteration, regions: Regions, count: int) -> dict[str, float]:
    """Seconds of an iteration in each region of the profiler, which is on for these iterations only."""
    regions.reset()
    regions.enabled = True
    try:
        blocks(iteration, count)()
    finally:
        regions.enabled = False
    return {name: seconds / count for name, seconds in regions.totals().items()}


def optimizer_share(seconds: dict[str, float]) -> float:
    """Share of the optimizers, the average and the mask's selection in the time."""
    return sum(seconds.get(name, 0.0) for name in OPTIMIZER_SIDE) / sum(seconds.values())


def timing_row(timing: Timing, block: int, images: int) -> dict[str, Any]:
    """Milliseconds of an iteration, and images per second."""
    ms = {name: 1e3 * seconds / block for name, seconds in timing.summary().items()}
    return {"ms": ms, "images_per_second": 1e3 * images / ms["p50"]}


def measure(
    problem: Problem, name: str, variant: Variant, density: float, *, block: int, repeats: int, max_seconds: float
) -> dict[str, Any]:
    """A row: one method in one variant, beside the rival and beside SFD."""
    device, rival_kind = problem.device, RIVAL_PRECISION[variant.precision]
    regions = Regions(False, device)
    graphs_before, breaks_before = compiled_graphs(), graph_breaks()

    def start(make: Callable[[], Callable], kind: str) -> Callable:
        with precision(kind):
            iteration = make()
            blocks(iteration, block)()
        return iteration

    def ours(method: str, own: Regions) -> Callable[[], Iteration]:
        options = variant.options(method, density)
        return lambda: problem.ours(method, variant.precision, compile=variant.compile, regions=own, **options)

    masks = {} if name == "sfd" else {"density": density}
    rival, rival_bytes = measured_memory(device, lambda: start(lambda: Rival(problem, name, **masks), rival_kind))
    iteration, bytes_ = measured_memory(device, lambda: start(ours(name, regions), variant.precision))
    calls = {"ours": (iteration, variant.precision), "rival": (rival, rival_kind)}
    if name != "sfd":
        calls["sfd"] = (start(ours("sfd", Regions()), variant.precision), variant.precision)

    def timed(call: Callable, kind: str) -> Callable[[], None]:
        def run() -> None:
            with precision(kind):
                blocks(call, block)()

        return run

    functions = {key: timed(*call) for key, call in calls.items()}
    graphs_after = compiled_graphs()
    timings = interleave(functions, device, repeats=repeats, warmup=1, max_seconds=max_seconds)
    with precision(variant.precision):
        by_phase = phases(iteration, regions, block)
    images = problem.batch
    row: dict[str, Any] = {
        **timing_row(timings["ours"], block, images),
        "rival": {**timing_row(timings["rival"], block, images), "precision": rival_kind},
        "speedup": ratio_of_medians(timings["rival"], timings["ours"]),
        "speedup_paired": median_of_ratios(timings["rival"], timings["ours"]),
        "peak_bytes": bytes_,
        "rival_peak_bytes": rival_bytes,
        "phases_seconds": by_phase,
        "optimizer_share": optimizer_share(by_phase),
        "blocks": len(timings["ours"].seconds),
        "iterations_in_block": block,
    }
    if "sfd" in timings:
        row["over_sfd"] = ratio_of_medians(timings["ours"], timings["sfd"])
        row["over_sfd_paired"] = median_of_ratios(timings["ours"], timings["sfd"])
    if variant.compile:
        row["compiled_graphs"] = graphs_after - graphs_before
        row["compiled_while_timed"] = compiled_graphs() - graphs_after
        row["graph_breaks"] = graph_breaks() - breaks_before
    return row


def figures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's numbers with their bars. Bars are judged for the published networks on a GPU."""
    judged = row["device"] == "cuda" and row["arch"] in ("cifar10", "stl10") and row["batch"] >= 64
    kind = "bf16" if row["precision"] == "bf16" else "equal"
    numbers = [("rival / ours", row["speedup"], BARS[kind], BARS["bf16 aim"] if kind == "bf16" else None, False)]
    numbers.append(("memory / rival", row["peak_bytes"] / max(1, row["rival_peak_bytes"]), BARS["memory"], None, True))
    numbers.append(("optimizer, selection, average", row["optimizer_share"], BARS["optimizer"], None, True))
    if row["method"] == "pecker":
        numbers.append(("pecker / sfd", row["over_sfd"], BARS["pecker"], None, True))
    return [
        {
            "figure": name,
            "number": number,
            "bar": bar,
            "aim": aim,
            "at_most": at_most,
            "met": (number <= bar if at_most else number >= bar) if judged else None,
        }
        for name, number, bar, aim, at_most in numbers
    ]


def _release(device: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(
    archs: Sequence[str] = ("cifar10",),
    methods: Sequence[str] = ("sfd", "pecker"),
    variants: Sequence[Variant] = (Variant("bf16"),),
    *,
    device: str = "cpu",
    batch: int | None = None,
    density: float = 0.5,
    block: int = 10,
    repeats: int = 10,
    max_seconds: float = 30.0,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure every method in every variant on every architecture.

    Parameters
    ----------
    archs, methods : sequence of str
        Names of ARCHITECTURES and METHODS.
    variants : sequence of Variant
        Ways of computing.
    device : str
        "cpu" or "cuda".
    batch : int, optional
        Retained samples, and as many forgotten ones; the published number by default.
    density : float
        Density of masks.
    block : int
        Iterations that are timed together. A multiple of 10 gives masks of every tenth iteration their right share.
    repeats : int
        Blocks of each alternative.
    max_seconds : float
        Time to spend on a row, and at most on a matrix product.
    progress : callable
        Called with each row.

    Returns
    -------
    dict
        "conditions" and "rows". A row that does not fit into the device's memory has "skipped".

    Raises
    ------
    ValueError
        If an argument is wrong.
    """
    check_choice("arch", archs, list(ARCHITECTURES))
    check_choice("methods", methods, list(METHODS))
    check_choice("precision", [variant.precision for variant in variants], list(PRECISIONS))
    check_choice("device", [device.partition(":")[0]], ["cpu", "cuda"])
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device")
    if where.type != "cuda" and any(variant.cuda_graphs for variant in variants):
        raise ValueError("cuda_graphs is on, which needs a GPU: the device is cpu")
    for name, value in (("block", block), ("repeats", repeats), ("batch", 1 if batch is None else batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    results = {"version": FORMAT_VERSION, "conditions": conditions(where), "rows": []}
    kinds = {variant.precision for variant in variants}
    rates = {kind: matmul_rate(where, kind, min(2.0, max_seconds)) for kind in kinds}
    for arch in archs:
        problem = Problem.make(arch, batch, where)
        for name in methods:
            rival_flops = iteration_flops(arch, name, problem.batch, where, rival=True)
            masked = {} if name == "sfd" else {"density": density}
            flops = iteration_flops(arch, name, problem.batch, where, **masked)
            for variant in variants:
                label = {"arch": arch, "numel": problem.numel, "batch": problem.batch, "method": name}
                label |= {"device": where.type, "variant": variant.name, "precision": variant.precision}
                label |= {"compile": variant.compile, **variant.options(name, density)}
                label |= {"flops": flops, "rival_flops": rival_flops}
                limits = {"block": block, "repeats": repeats, "max_seconds": max_seconds}
                try:
                    measured = measure(problem, name, variant, density, **limits)
                except torch.OutOfMemoryError as error:
                    measured = {"skipped": str(error).splitlines()[0]}
                else:
                    rate = flops / (measured["ms"]["p50"] / 1e3)
                    peak = named_peak(results["conditions"]["device"], variant.precision)
                    measured["flops_per_second"] = rate
                    measured["of_matmul_rate"] = rate / rates[variant.precision]
                    measured["of_named_peak"] = None if peak is None else rate / peak
                    measured["figures"] = figures({**label, **measured})
                row = {**label, **measured}
                results["rows"].append(row)
                progress(row)
                _release(where)
    results["matmul_flops_per_second"] = rates
    return results


# For a check of a few minutes, and for an hour.
QUICK = (Variant("bf16"), Variant("bf16", compile=True), Variant("bf16", cuda_graphs=True), Variant("tf32", True))
STANDARD = (
    *(Variant(kind, compiled) for kind in ("fp32", "tf32", "bf16") for compiled in (False, True)),
    *(Variant("bf16", compiled, cuda_graphs=True) for compiled in (False, True)),
    *(Variant("bf16", True, graphs, split_batches=True) for graphs in (False, True)),
)
SWITCHES = {
    "precision": ["bf16"],
    "compile": ["off"],
    "cuda_graphs": ["off"],
    "split": ["off"],
}


def variants_of(args: argparse.Namespace) -> Sequence[Variant]:
    """All combinations of the switches; without any switch, a selection of them."""
    switches = {name: getattr(args, name) for name in SWITCHES}
    if args.quick or not any(switches.values()):
        standard = QUICK if args.quick else STANDARD
        return standard if args.device.startswith("cuda") else [v for v in standard if not v.cuda_graphs]
    values = [switches[name] or default for name, default in SWITCHES.items()]
    kinds, compiled, graphs, split = values
    on = lambda words: [word == "on" for word in words]  # noqa: E731
    ways = itertools.product(kinds, on(compiled), on(graphs), on(split))
    return [Variant(*way) for way in ways]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m pecker_fast.benchmarks.train_step", description=__doc__)
    result.add_argument("--arch", "--size", nargs="+", default=["cifar10", "stl10"], help=", ".join(ARCHITECTURES))
    result.add_argument("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    result.add_argument("--precision", nargs="+", help=", ".join(PRECISIONS))
    switch: dict[str, Any] = {"nargs": "+", "choices": ["off", "on"]}
    result.add_argument("--compile", help="torch.compile", **switch)
    result.add_argument("--cuda-graphs", help="CUDA graphs of the gradients", **switch)
    result.add_argument("--split", help="retained and then forgotten samples", **switch)
    result.add_argument("--density", type=float, default=0.5, help="of masks")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--batch", type=int, help="retained samples; the published number by default")
    result.add_argument("--block", type=int, default=10, help="iterations timed together")
    result.add_argument("--repeats", type=int, default=10, help="blocks of each alternative")
    result.add_argument("--max-seconds", type=float, default=30.0, help="for a row, beyond three blocks")
    result.add_argument("--quick", action="store_true", help="cifar10, sfd and pecker, in four variants")
    result.add_argument("--json", help="file to write the results to")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.quick:
        args.arch, args.methods = ["cifar10"], ["sfd", "pecker"]
    try:
        if args.json is not None and not Path(args.json).parent.is_dir():
            raise ValueError(f"json is {args.json!r}, but there is no folder {str(Path(args.json).parent)!r}")
        results = run(
            args.arch,
            args.methods,
            variants_of(args),
            device=args.device,
            batch=args.batch,
            density=args.density,
            block=args.block,
            repeats=args.repeats,
            max_seconds=args.max_seconds,
            progress=lambda row: print(text_table([row]), file=sys.stderr),
        )
    except ValueError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return 2
    print(text_table(results["rows"]))
    if args.json is not None:
        save(results, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
