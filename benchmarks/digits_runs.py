"""Short runs on the digits, seed by seed: what a way of computing, or of masking, does to losses and to the result.

``python -m pecker_fast.benchmarks.digits_runs precision|granularity --json out.json``

precision: PECKER in bf16 autocast against float32 on the same random numbers; the difference of the loss curves beside
their spread over seeds. granularity: masks of entries, rows and whole parameters at several densities, beside SFD.
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
from pecker_fast.diffusion import sample_one_step
from pecker_fast.metrics import Evaluator, load_judge
from pecker_fast.models import load_network
from pecker_fast.training.presets import method_options, preset
from pecker_fast.unlearning import Compute, ForgetRequest, Problem, Setting, method_class

from .run import conditions, save

FORMAT_VERSION = 1
SAMPLES_PER_CLASS = 60
NETWORK = Path(str(resources.files("pecker_fast").joinpath("assets", "digits", "unet")))


def run(method: str, seed: int, iterations: int, *, device: str, mixed_precision: str = "no", **changes: Any) -> dict:
    """A run on the shipped network with a schedule of ``iterations``: losses of every one, the share of the weights
    whose gradients the forget batch needs, and the averaged generator's evaluation."""
    network, schedule = load_network(NETWORK)
    request = ForgetRequest.of(network, [preset("digits").forget_class], preset("digits").cover_class)
    compute = Compute(seed=seed, device=torch.device(device), mixed_precision=mixed_precision)
    setting = Setting(Problem(network, schedule, request), compute)
    kind = method_class(method)
    options = replace(method_options("digits", kind), max_train_steps=iterations, **changes)
    method_ = kind(setting, options)
    phase = method_.phases[-1]
    phase.start(None)
    curve: dict[str, list[float]] = {}
    for number in range(iterations):
        for name, loss in phase.step(number).items():
            curve.setdefault(name, []).append(loss.item())
    labels = torch.arange(request.num_classes).repeat_interleave(SAMPLES_PER_CLASS)
    evaluator = Evaluator(load_dataset("digits", "all"), load_judge("digits"), request.forget_classes, 1)
    with phase.averaged() as averaged:
        images = sample_one_step(averaged, method_.one_step, labels, seed=seed).float().cpu()
    found = evaluator(images, labels)
    wanted = ("ua", "retain_accuracy", "frechet_distance", "diversity")
    said = {"method": method, "seed": seed, "iterations": iterations, "losses": curve}
    said |= {name: found[name] for name in wanted}
    mask = None if phase.masker is None else phase.masker.mask
    if mask is not None:
        reached = [count > 0 for count in mask.tensor_counts()]
        entries = sum(numel for numel, here in zip(mask.numels, reached, strict=True) if here)
        said |= {"mask_density": mask.density, "weight_gradients": entries / mask.numel}
    return said


def precision(seeds: Sequence[int], iterations: int, device: str) -> dict[str, Any]:
    """Curves in both precisions, and for each loss: mean over iterations of |bf16 - float32| on one seed, and of the
    standard deviation of float32 over seeds."""
    # Small batches: a CPU without bf16 instructions takes ten times as long for them.
    small = {"train_batch_size": 16, "forget_batch_size": 8, "saliency_batch_size": 16}
    rows = [
        {**run("pecker", seed, iterations, device=device, mixed_precision=kind, **small), "mixed_precision": kind}
        for seed in seeds
        for kind in ("no", "bf16")
    ]
    return {"rows": rows, "agreement": agreement(rows)}


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | bool]]:
    """What ``precision`` says of its rows."""
    by_kind = {kind: [row["losses"] for row in rows if row["mixed_precision"] == kind] for kind in ("no", "bf16")}
    said = {}
    for name in by_kind["no"][0]:
        full, half = ([losses[name] for losses in by_kind[kind]] for kind in ("no", "bf16"))
        pairs = zip(chain.from_iterable(full), chain.from_iterable(half), strict=True)
        difference = statistics.mean(abs(a - b) for a, b in pairs)
        spread = statistics.mean(statistics.stdev(at) for at in zip(*full, strict=True))
        said[name] = {"difference": difference, "spread": spread, "within": difference <= spread}
    return said


def granularity(seeds: Sequence[int], iterations: int, device: str) -> dict[str, Any]:
    """Every granularity at densities 0.5 and 0.1, and SFD."""
    rows = []
    for seed in seeds:
        for density in (0.5, 0.1):
            for kind in ("entry", "row", "tensor"):
                found = run("pecker", seed, iterations, device=device, density=density, granularity=kind)
                rows.append({**found, "density": density, "granularity": kind})
                print({name: value for name, value in rows[-1].items() if name != "losses"}, file=sys.stderr)
        rows.append(run("sfd", seed, iterations, device=device))
    return {"rows": rows}


STUDIES = {"precision": (precision, 30), "granularity": (granularity, 40)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pecker_fast.benchmarks.digits_runs", description=__doc__)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="of each run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file to write the results to")
    given = parser.parse_args(arguments)
    study, iterations = STUDIES[given.study]
    found = study(given.seeds, given.iterations or iterations, given.device)
    results = {"version": FORMAT_VERSION, "study": given.study, "conditions": conditions(torch.device(given.device))}
    for row in found["rows"]:
        print({name: value for name, value in row.items() if name != "losses"})
    for name, value in found.get("agreement", {}).items():
        print(name, value)
    if given.json is not None:
        save({**results, **found}, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
