"""PECKER on the digits in bfloat16 autocast and in float32, on the same random numbers.

``python -m pecker_fast.benchmarks.studies.precision --json out.json``

Compares the difference between the two loss curves with the spread of the float32 curves over the seeds.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pecker_fast.data import load_dataset
from pecker_fast.metrics import Evaluator, load_judge
from pecker_fast.models import load_network
from pecker_fast.runs.presets import class_preset, method_options
from pecker_fast.unlearning import Compute, ForgetRequest, Problem, Setting, method_class

from ..run import conditions, save

FORMAT_VERSION = 1
ITERATIONS = 30
SAMPLES_PER_CLASS = 60
NETWORK = Path(str(resources.files("pecker_fast").joinpath("assets", "digits", "unet")))


def run(seed: int, iterations: int, *, device: str, mixed_precision: str, **changes: Any) -> dict[str, Any]:
    """PECKER on the shipped network with a schedule of ``iterations``.

    Returns the losses of every iteration and the evaluation of the averaged generator.
    """
    network, schedule = load_network(NETWORK)
    request = ForgetRequest.of(network, [class_preset("digits").forget_class], class_preset("digits").cover_class)
    compute = Compute(seed=seed, device=torch.device(device), mixed_precision=mixed_precision)
    setting = Setting(Problem(network, schedule, request), compute)
    kind = method_class("pecker")
    method = kind(setting, replace(method_options("digits", kind), max_train_steps=iterations, **changes))
    phase = method.phases[-1]
    phase.start(None)
    losses: dict[str, list[float]] = {}
    for number in range(iterations):
        for name, loss in phase.step(number).items():
            losses.setdefault(name, []).append(loss.item())
    labels = torch.arange(request.num_classes).repeat_interleave(SAMPLES_PER_CLASS)
    evaluator = Evaluator(load_dataset("digits", "all"), load_judge("digits"), request.forget_classes, 1)
    with phase.averaged() as averaged:
        images = method.sampler.draw(averaged, schedule, labels, seed).float().cpu()
    measured = evaluator(images, labels)
    return {
        "method": "pecker",
        "seed": seed,
        "iterations": iterations,
        "losses": losses,
        **{key: measured[key] for key in ("ua", "retain_accuracy", "frechet_distance", "diversity")},
        "mask_density": phase.masker.mask.density,
        "mixed_precision": mixed_precision,
    }


def precision(seeds: Sequence[int], iterations: int, device: str) -> dict[str, Any]:
    """A run in each precision on each seed, and the agreement of their losses."""
    # Small batches: a CPU without bfloat16 instructions takes ten times as long as in float32.
    small = {"train_batch_size": 16, "forget_batch_size": 8, "saliency_batch_size": 16}
    rows = [
        run(seed, iterations, device=device, mixed_precision=kind, **small) for seed in seeds for kind in ("no", "bf16")
    ]
    return {"rows": rows, "agreement": agreement(rows)}


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | bool]]:
    """For each loss, means over the iterations.

    "difference" is |bf16 - float32| on one seed, "spread" the standard deviation of float32 over the seeds, and
    "within" whether the difference is at most the spread.
    """
    by_kind = {kind: [row["losses"] for row in rows if row["mixed_precision"] == kind] for kind in ("no", "bf16")}
    result = {}
    for name in by_kind["no"][0]:
        full, half = ([losses[name] for losses in by_kind[kind]] for kind in ("no", "bf16"))
        pairs = zip(chain.from_iterable(full), chain.from_iterable(half), strict=True)
        difference = statistics.mean(abs(a - b) for a, b in pairs)
        spread = statistics.mean(statistics.stdev(at) for at in zip(*full, strict=True))
        result[name] = {"difference": difference, "spread": spread, "within": difference <= spread}
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study, prints its results and, with --json, writes them to a file."""
    parser = argparse.ArgumentParser(prog="python -m pecker_fast.benchmarks.studies.precision", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of each run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file to write the results to")
    args = parser.parse_args(arguments)
    study = precision(args.seeds, args.iterations, args.device)
    for row in study["rows"]:
        print({name: value for name, value in row.items() if name != "losses"})
    for name, value in study["agreement"].items():
        print(name, value)
    if args.json is not None:
        results = {"version": FORMAT_VERSION, "study": "precision", "conditions": conditions(torch.device(args.device))}
        save({**results, **study}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
