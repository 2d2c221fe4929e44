"""Runs benchmarks and writes their results, with the conditions they ran under, as JSON."""

import datetime
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pecker_fast import ops
from pecker_fast.environment import environment
from pecker_fast.ops.dispatch import BACKENDS

from . import gpu_figures, step_overhead  # noqa: F401 -- they join the registry
from .inputs import DTYPES, Problem
from .registry import OPS, OURS, Case, Figure
from .shapes import SIZES
from .timing import copy_on, interleave, launches, median_of_ratios, ratio_of_medians

FORMAT_VERSION = 1


def check_choice(argument: str, values: Sequence[str], allowed: Sequence[str]) -> None:
    """Raises ValueError with the allowed values if one of the values is not among them."""
    for value in values:
        if value not in allowed:
            raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(allowed)}")


def conditions(device: torch.device) -> dict[str, Any]:
    """Machine, versions and load, which a reader of the figures needs."""
    about = environment()
    return {
        **about,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else about["cpu"],
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "cache": "flushed before every call" if device.type == "cuda" else "as the previous call left it",
        "method": "alternatives in turns in one process; ratio of the medians",
    }


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as info:
            values = dict(line.split(":") for line in info)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def measure(case: Case, figure: Figure, problem: Problem, repeats: int, max_seconds: float) -> dict[str, Any]:
    """One row of the results: the figure's number, and the times behind it."""
    if figure.value is not None:
        return {"number": figure.value()}
    pair = {name: case.functions[name] for name in (figure.numerator, figure.denominator)}
    copied = None
    if figure.against_copy is not None:
        copy, copied = copy_on(problem.device)
        pair = {figure.numerator: pair[figure.numerator], "copy": copy}
    timings = interleave(pair, problem.device, repeats=repeats, max_seconds=max_seconds)
    numerator, *others = timings.values()
    denominator = others[0] if others else numerator
    row: dict[str, Any] = {
        "number": ratio_of_medians(numerator, denominator),
        "paired": median_of_ratios(numerator, denominator),
        "repeats": len(numerator.seconds),
        "seconds": {name: timing.summary() for name, timing in timings.items()},
        "floor_bytes": {name: case.floors[name] for name in pair if name in case.floors},
    }
    row["floor_gb_per_s"] = {
        name: floor * problem.numel / timings[name].median / 1e9 for name, floor in row["floor_bytes"].items()
    }
    if copied is not None:
        speed = copied / denominator.median
        row["copy_gb_per_s"] = speed / 1e9
        read = problem.numel * problem.itemsize / speed
        share = row["floor_gb_per_s"][figure.numerator] * 1e9 / speed
        row["number"] = share if figure.against_copy == "share" else numerator.median / read
        del row["paired"]
    if problem.device.type == "cuda":
        # Only once for each function of a case, because the profiler is slow.
        for key, count in (("launches", launches), ("peak_memory_bytes", _peak_memory)):
            known = case.counted.setdefault(key, {})
            row[key] = {name: known[name] if name in known else known.setdefault(name, count(function))
                        for name, function in pair.items()}  # fmt: skip
    return row


def _peak_memory(function: Callable[[], object]) -> int:
    """Peak bytes that a call allocates on the GPU, beyond those allocated before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def met(figure: Figure, number: float) -> bool | None:
    """Whether the bar is met; None without a bar."""
    if figure.bar is None:
        return None
    return number <= figure.bar if figure.at_most else number >= figure.bar


def run(
    names: Sequence[str] = (),
    *,
    sizes: Sequence[str] = ("cifar10",),
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (1, 2),
    device: str = "cpu",
    backend: str | None = None,
    repeats: int = 30,
    max_seconds: float = 20.0,
    stop_after: float | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Runs the operations named (all of ``OPS`` when none is) and returns {"conditions": ..., "rows": [...]}.

    ``threads``: CPU threads to run with, one set of rows for each (a GPU runs once). ``progress`` is called with each
    row. ``max_seconds``: time to spend on a row, beyond three repeats. ``stop_after``: seconds after which no further
    figure is begun. Raises ValueError for a wrong argument.
    """
    try:
        place = torch.device(device)
    except RuntimeError:
        # Its message lists devices that there are no kernels for.
        place = None
    check_choice("device", [place.type if place else device], ["cpu", "cuda"])
    names = list(names) or [name for name, op in OPS.items() if place.type in op.devices]
    check_choice("operation", names, list(OPS))
    check_choice("size", sizes, SIZES)
    check_choice("dtype", dtypes, list(DTYPES))
    if not threads or any(count < 1 for count in threads):
        raise ValueError(f"threads is {list(threads)}, expected numbers of at least 1")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    if not 0 <= max_seconds < math.inf:
        raise ValueError(f"max_seconds is {max_seconds}, expected a number at least 0")
    elsewhere = [name for name in names if place.type not in OPS[name].devices]
    if elsewhere:
        raise ValueError(f"operation is {elsewhere[0]!r}, which runs on {', '.join(OPS[elsewhere[0]].devices)} only")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device")
    if backend is not None:
        check_choice("backend", [backend], BACKENDS)
        reason = ops.backend_reasons(place)[backend]
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot run here: {reason}")

    deadline = None if stop_after is None else time.monotonic() + stop_after
    results = {"version": FORMAT_VERSION, "conditions": conditions(place), "rows": []}
    threads_before = torch.get_num_threads()
    try:
        for count in threads if place.type == "cpu" else [threads_before]:
            torch.set_num_threads(count)
            for size in sizes:
                for dtype in dtypes:
                    problem = Problem(size, DTYPES[dtype], place, backend)
                    labels = {"size": size, "numel": problem.numel, "dtype": dtype, "device": place.type}
                    labels |= {"threads": count if place.type == "cpu" else None, "backend": backend}
                    for name in names:
                        for row in _rows(name, problem, repeats, max_seconds, deadline):
                            results["rows"].append({"op": name, **labels, **row})
                            progress(results["rows"][-1])
    finally:
        torch.set_num_threads(threads_before)
    return results


def _rows(name: str, problem: Problem, repeats: int, max_seconds: float, deadline: float | None):
    op = OPS[name]
    free = available_bytes(problem.device)
    needed = op.buffers * problem.numel
    if free is not None and needed > 0.9 * free:
        skipped = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        yield {"figure": op.description, "skipped": skipped}
        return
    case = op.build(problem)
    for figure in case.figures:
        if deadline is not None and time.monotonic() > deadline:
            yield {"figure": figure.name, "skipped": "out of time"}
            continue
        row = measure(case, figure, problem, repeats, max_seconds)
        yield {
            "figure": figure.name,
            "unit": figure.unit,
            "bar": figure.bar,
            "aim": figure.aim,
            "at_most": figure.at_most,
            "met": met(figure, row["number"]),
            "ours": OURS,
            **row,
        }


def save(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes the results as JSON; the file appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file of ``save``. Raises ValueError for any other file."""
    try:
        results = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(results, dict) or results.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not a result file of version {FORMAT_VERSION}")
    return results
