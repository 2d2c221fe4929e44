"""Peak resident memory of one iteration of a patch run on networks of Stable Diffusion's size, beside its estimate.

    python -m pecker_fast.benchmarks.full_size_memory --model sd15
    python -m pecker_fast.benchmarks.full_size_memory --model sdxl --depth_share .5
    python -m pecker_fast.benchmarks.full_size_memory --table

On the CPU, with random weights, which are filled in bfloat16: no float32 copy of them ever exists. One iteration of one
retained and one forgotten prompt takes all that a run does: the masks of psi and theta (of few chunks, which changes
the time alone), psi's step and theta's. Memory is the process's resident memory (VmHWM, reset before each part), which
counts Python, libraries and the kernels' own buffers. Ends itself if the machine runs out of it (--least_available).
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.diffusion import NoiseSchedule, PromptTable, TextConditioned
from pecker_fast.profiling import Regions
from pecker_fast.training.memory import SD15, SDXL, MemoryEstimate, empty_conditioning, estimate_memory
from pecker_fast.unlearning import Compute, Method, Placement, Problem, Setting, method_class
from pecker_fast.unlearning.patch import PatchOptions

from .memory import peak_reset, status_bytes
from .run import available_bytes, conditions
from .sd_step import REQUEST, TINY

MODELS = {"sd15": SD15, "sdxl": SDXL, "tiny": TINY}
NAMES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL", "tiny": "a tiny one"}
# Bytes that a run may take at most.
BARS = {"sd15": 12 << 30, "sdxl": 20 << 30}
RESULTS = Path(__file__).resolve().parent / "results" / "memory"
# Blocks of at least this size are mapped when they are allocated and unmapped when they are freed. Otherwise the C
# library keeps freed blocks of up to 32 MiB in pieces, which is its own affair.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}
# What is measured: the networks are made; then the parts of an iteration as the estimate names them.
PARTS = (
    "networks",
    "score network's saliency gradient",
    "score network's step",
    "saliency gradient",
    "generator's step",
)
GENERATOR_REGIONS = ("generator forward", "teacher and score network", "generator backward")


class PeakRegions(Regions):
    """Records the peak resident memory, and the seconds, of each part of an iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._part: int | None = None
        self._since = 0.0

    def __call__(self, name: str) -> Any:
        part = self._part
        if name == "networks":
            part = 0
        elif name in ("saliency", "selection"):
            part = 1 if part in (0, 1) else 3
        elif name in ("sampling", "score step"):
            part = 2
        elif name in GENERATOR_REGIONS:
            part = 4
        if part != self._part:
            self.finish()
            self._part = part
        return super().__call__(name)

    def finish(self) -> None:
        """End the current part; the next one begins."""
        if self._part is not None:
            self.peaks[PARTS[self._part]] = status_bytes("VmHWM")
            self.seconds[PARTS[self._part]] = time.perf_counter() - self._since
            print(f"{PARTS[self._part]}: {self.peaks[PARTS[self._part]] / 2**30:.2f} GiB", flush=True)
        peak_reset()
        self._since = time.perf_counter()


def shallower(config: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A configuration with a share of the layers, at least one, in each block."""

    def less(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(less, value))
        return max(1, round(share * value))

    names = ("layers_per_block", "transformer_layers_per_block")
    return {name: less(value) if name in names else value for name, value in config.items()}


@torch.no_grad()
def random_network(config: Mapping[str, Any], latents: int, dtype: torch.dtype) -> TextConditioned:
    """A network with random weights whose activations stay of the order of 1."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    for module in unet.modules():
        for name, param in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(param.shape, dtype=dtype)))
    generator = torch.Generator().manual_seed(0)
    # Drawn once and repeated: billions of draws take long, and memory does not depend on them.
    normal = torch.randn(1 << 20, generator=generator).to(dtype)
    for name, param in unet.named_parameters():
        if param.ndim == 1:
            param.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scale = param[0].numel() ** -0.5
        for piece in param.view(-1).split(len(normal)):
            piece.copy_(normal[: len(piece)]).mul_(scale)
    conditioning = empty_conditioning(config, len(REQUEST.prompts), dtype)
    for _, value in conditioning.items():
        value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.full_like(value, 8 * latents))
    return TextConditioned(unet, PromptTable(conditioning), NoiseSchedule.linear(), sample_size=latents)


def patch_options(args: argparse.Namespace) -> PatchOptions:
    """One retained and one forgotten prompt, all that saves memory."""
    return PatchOptions(
        max_train_steps=1,
        train_batch_size=1,
        forget_batch_size=1,
        t_init=625,
        split_batches=True,
        density=args.density,
        score_density=args.density,
        saliency_chunks=args.saliency_chunks,
    )


def placement_of(args: argparse.Namespace) -> Placement:
    """Weights in bfloat16 in one copy, with float32 masters of the mask's entries."""
    return Placement(
        weights_dtype=torch.bfloat16,
        teacher_dtype=torch.bfloat16,
        master_weights=True,
        gradient_checkpointing=True,
        share_weights=True,
        saliency_parts=args.saliency_parts,
    )


def iterate(config: Mapping[str, Any], args: argparse.Namespace, regions: Regions) -> Method:
    """A patch method on random weights after its first iteration."""
    with regions("networks"):
        teacher = random_network(config, args.latents, torch.bfloat16)
        setting = Setting(Problem(teacher, teacher.schedule, REQUEST), Compute(regions=regions), placement_of(args))
        method = method_class("patch")(setting, patch_options(args))
    phase = method.phases[-1]
    phase.start(None)
    losses = phase.step(0)
    if not all(loss.isfinite() for loss in losses.values()):
        raise RuntimeError(f"losses are {losses}: the random weights are no network to measure")
    return method


def estimate(config: Mapping[str, Any], args: argparse.Namespace) -> MemoryEstimate:
    """What ``--dry_run`` computes."""
    return estimate_memory(
        method_class("patch"),
        patch_options(args),
        unet=config,
        latent_size=args.latents,
        schedule=NoiseSchedule.linear(),
        request=REQUEST,
        placement=placement_of(args),
        mixed_precision="no",
        low_embeddings=True,
        model=NAMES[args.model],
    )


@contextmanager
def watched(least: float) -> Iterator[None]:
    """End the process if the machine has less than ``least`` GiB of memory left."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            left = available_bytes(torch.device("cpu"))
            if left is not None and left < least * 2**30:
                gib = left / 2**30
                print(f"the machine has {gib:.1f} GiB of memory left, less than --least_available: stopped", flush=True)
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure(config: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of the parts of an iteration."""
    # Loads what an iteration needs of the libraries before anything is measured.
    iterate(TINY, argparse.Namespace(**{**vars(args), "latents": TINY["sample_size"]}), Regions())
    gc.collect()
    peak_reset()
    before = status_bytes("VmRSS")
    regions = PeakRegions()
    method = iterate(config, args, regions)
    regions.finish()
    phase, peaks = method.phases[-1], regions.peaks
    optimizers = (phase.score_optimizer, phase.generator_optimizer)
    states = [value for o in optimizers for state in o.state.values() for value in state.values()]
    return {
        "process_bytes": before,
        "measured_bytes": peaks,
        "peak_bytes": max(peaks.values()),
        "weights_bytes": _distinct_bytes([method.setting.problem.teacher, method.score, method.generator]),
        "state_bytes": sum(value.nbytes for value in states if isinstance(value, Tensor)),
        "seconds": regions.seconds,
    }


def _distinct_bytes(networks: list[nn.Module]) -> int:
    params = {param.data_ptr(): param for network in networks for param in network.parameters()}
    return sum(param.nbytes for param in params.values())


def result_of(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, estimate and compare."""
    config = shallower(MODELS[args.model], args.depth_share)
    result: dict[str, Any] = {
        "conditions": conditions(torch.device("cpu")),
        "model": args.model,
        "depth_share": args.depth_share,
        "latents": args.latents,
        "options": dataclasses.asdict(patch_options(args)),
        "placement": {name: str(value) for name, value in dataclasses.asdict(placement_of(args)).items()},
    }
    if args.measure:
        with watched(args.least_available):
            result |= measure(config, args)
        gc.collect()
    expected = estimate(config, args)
    # The process itself is not the estimate's to know.
    own = result.get("process_bytes", 0)
    result["parameters"] = expected.parameters
    result["estimated_bytes"] = {name: size + own for name, size in expected.peaks.items()}
    result["estimated_peak_bytes"] = expected.peak + own
    return result


def rows_of(result: Mapping[str, Any]) -> list[str]:
    """Lines of a table of a result, in GiB."""
    share = "" if result["depth_share"] == 1 else f", {result['depth_share']:g} of the layers"
    title = f"{NAMES[result['model']]}{share} ({result['parameters'] / 1e6:,.0f} million parameters)"
    lines = [f"| {title} | measured | estimated | estimated / measured |", "| --- | ---: | ---: | ---: |"]
    measured, estimated = result.get("measured_bytes", {}), result["estimated_bytes"]
    if measured:
        lines.append(f"| the process without networks | {_gib(result['process_bytes'])} | | |")
        lines.append(f"| networks | {_gib(measured['networks'])} | | |")
    lines += [_row(name, measured.get(name), estimated[name]) for name in estimated]
    lines.append(_row("**most at a time**", result.get("peak_bytes"), result["estimated_peak_bytes"]))
    return lines


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def _row(name: str, measured: int | None, estimated: int) -> str:
    ratio = "-" if measured is None else f"{estimated / measured:.3f}"
    return f"| {name} | {_gib(measured)} | {_gib(estimated)} | {ratio} |"


def file_of(args: argparse.Namespace) -> Path:
    """Where a result is written."""
    depth = "" if args.depth_share == 1 else f"-depth{args.depth_share:g}"
    kind = "" if args.measure else "-estimate"
    return args.folder / f"full-size-{args.model}{depth}-{args.latents}-parts{args.saliency_parts}{kind}.json"


def table(folder: Path) -> str:
    """A table of every result in a folder."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("full-size-*.json"))]
    return "\n\n".join("\n".join(rows_of(result)) for result in results)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    result.add_argument("--model", default="sd15", choices=MODELS)
    result.add_argument("--depth_share", type=float, default=1.0, help="share of the layers in each block")
    result.add_argument("--latents", type=int, default=64, help="height and width of latents")
    result.add_argument("--density", type=float, default=0.05, help="share of the weights of psi and of theta")
    result.add_argument("--saliency_parts", type=int, help="default: 1, of SDXL 4")
    result.add_argument("--saliency_chunks", type=int, default=1)
    result.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True, help="or estimate only")
    result.add_argument("--least_available", type=float, default=2.0, help="GiB that are left to the machine")
    result.add_argument("--folder", type=Path, default=RESULTS, help="for the results")
    result.add_argument("--table", action="store_true", help="print a table of the results, and do nothing else")
    return result


def main(words: list[str] | None = None) -> None:
    args = parser().parse_args(words)
    if args.saliency_parts is None:
        args.saliency_parts = 4 if args.model == "sdxl" else 1
    if args.table:
        print(table(args.folder))
        return
    if args.measure and any(os.environ.get(name) != value for name, value in MAPPED.items()):
        # The C library reads them when a process starts.
        command = [sys.executable, "-m", "pecker_fast.benchmarks.full_size_memory", *(words or sys.argv[1:])]
        sys.exit(subprocess.run(command, env={**os.environ, **MAPPED}).returncode)
    result = result_of(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    file_of(args).write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(rows_of(result)))
    bar = BARS.get(args.model)
    if bar is not None and args.depth_share == 1 and args.latents == 64:
        peak = result.get("peak_bytes", result["estimated_peak_bytes"])
        print(f"{peak / 2**30:.2f} GiB, the bar is {bar / 2**30:.0f} GiB: {'met' if peak <= bar else 'MISSED'}")


if __name__ == "__main__":
    main()
