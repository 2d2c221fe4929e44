"""``pecker-fast bench``."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..benchmarks import report, run
from ..benchmarks.registry import OPS
from ..parsing import parse_call
from ..runs.arguments import check_output

EXAMPLES = ("--list", "saliency_mask --size cifar10", "--size tiny --json bench.json")


def parse(words: Sequence[str]) -> Callable[[], None]:
    return parse_call(bench, words, "bench", positional={"names": "OPERATION"}, examples=EXAMPLES)


def bench(
    names: tuple[str, ...] = (),
    size: tuple[str, ...] = ("cifar10",),
    dtype: tuple[str, ...] = ("float32",),
    threads: tuple[int, ...] = (1, 2),
    device: str = "cpu",
    backend: str | None = None,
    repeats: int = 30,
    max_seconds: float = 20.0,
    json: str | None = None,
    list: bool = False,
) -> None:
    """Time the operations against baselines, print a table, and say which targets are met.

    Parameters
    ----------
    names
        Operations to run. Default: all.
    size
        Networks whose parameter shapes are used: tiny, small, cifar10, stl10, sd15, sdxl.
    dtype
        Dtypes of parameters and gradients: float32, bfloat16, float16.
    threads
        Numbers of CPU threads.
    device
        cpu or cuda.
    backend
        cuda, triton, cpu or reference. Default: the best one for the device.
    repeats
        Rounds for each row.
    max_seconds
        Time limit for a row; at least three rounds are run.
    json
        File for the results.
    list
        Only print the names of the operations.
    """
    if list:
        print("\n".join(f"{name:<26}{op.description}" for name, op in OPS.items()))
        return
    if json is not None:
        check_output(json, ".json", "a result of bench", run.load, name="json")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: Triton's times are its interpreter's", file=sys.stderr)

    def progress(row: dict[str, Any]) -> None:
        print(f"{row['figure']}: {report.cells(row)[4]}", file=sys.stderr)

    results = run.run(
        names,
        sizes=size,
        dtypes=dtype,
        threads=threads,
        device=device,
        backend=backend,
        repeats=repeats,
        max_seconds=max_seconds,
        progress=progress,
    )
    print(report.describe_conditions(results["conditions"]))
    print(report.text_table(results["rows"]))
    if json is not None:
        run.save(results, json)
