"""Processor time of an iteration: patches and dense rules in turns, in one process on one thread.

``python -m pecker_fast.benchmarks.studies.patch_step --json OUT.json``; figures are in ``benchmarks/results/patch``.
All start from the same distilled generator and draw as many samples. Ratios are to SFD.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..run import conditions, save
from .patch_conditions import CONDITIONS, PATCH, PLACES, Job
from .patch_runs import method_of, state_bytes

SFD = "sfd 0.05/0.05 at 0.0006"
COMPARED = (
    SFD,
    "pecker 0.3/0.02 at 0.0003",
    "pecker+ 0.3/0.02 at 0.00015",
    PATCH,
    "patch 0.02",
    "patch 0.1, gradients not packed",
    "lora at 0.0024",
)


def measure(preset: str, rounds: int, block: int, cache: Path) -> dict[str, Any]:
    """Seconds of an iteration of each rule, and its ratio to SFD's in the same round; medians over the rounds."""
    by_name = {condition.name: condition for condition in CONDITIONS}
    pair = next(pair for name, pair in PLACES if name == preset)
    phases = {name: method_of(Job(preset, pair, by_name[name], 0), cache).phases[-1] for name in COMPARED}
    runs: dict[str, Callable[[], None]] = {}
    for name, phase in phases.items():
        phase.start(None)
        numbers = iter(range(phase.iterations))

        def run(phase=phase, numbers=numbers) -> None:
            for _ in range(block):
                phase.step(next(numbers))

        # The first iterations allocate memory and compute masks.
        run()
        runs[name] = run
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append((time.process_time() - start) / block)
    return {
        name: {
            "seconds": statistics.median(values),
            "over_sfd": statistics.median(a / b for a, b in zip(values, seconds[SFD], strict=True)),
            "state_bytes": state_bytes(phases[name]),
            "gradient_bytes": phases[name].gradient_bytes(),
        }
        for name, values in seconds.items()
    }


def text_table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [f"{'rule':34} {'ms':>7} {'/ sfd':>6} {'state kB':>9} {'gradients kB':>13}"]
    for name, row in rows.items():
        sizes = f"{row['state_bytes'] / 1e3:9.0f} {row['gradient_bytes'] / 1e3:13.0f}"
        lines.append(f"{name:34} {1e3 * row['seconds']:7.1f} {row['over_sfd']:6.3f} {sizes}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pecker_fast.benchmarks.studies.patch_step", description=__doc__)
    presets = sorted({preset for preset, _ in PLACES})
    parser.add_argument("--preset", default="digits", choices=presets)
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each rule")
    parser.add_argument("--block", type=int, default=5, help="iterations in a block")
    parser.add_argument(
        "--cache", default="runs/patch-study", help="folder of distilled generators that are not shipped"
    )
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(arguments)
    # All rules of the study take 80 iterations; one block goes first.
    if args.rounds < 1 or args.block < 1 or (args.rounds + 1) * args.block > 80:
        print("rounds and block: expected at least 1 each, and (rounds + 1) x block at most 80", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows = measure(args.preset, args.rounds, args.block, Path(args.cache))
    print(text_table(rows))
    if args.json:
        facts = {**conditions(torch.device("cpu")), "threads": 1, "clock": "process_time"}
        save({"conditions": facts, "preset": args.preset, "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
