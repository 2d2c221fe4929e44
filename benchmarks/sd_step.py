"""Iterations of unlearning on a U-Net of Stable Diffusion's size with random weights: seconds, images per second, and
peak memory beside its estimate.

    python -m pecker_fast.benchmarks.sd_step --batch 1 2 4 8 --json benchmarks/results/sd15-step.json

The time of an iteration does not depend on the weights. A batch is a micro-batch here: that many retained and that many
forgotten prompts, for both networks.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from pecker_fast.diffusion import NoiseSchedule, PromptTable, TextConditioned
from pecker_fast.diffusion.architectures import ARCHITECTURES, UNET
from pecker_fast.profiling import peak_memory_bytes
from pecker_fast.runs.presets import method_options
from pecker_fast.training.memory import SD15, estimate_memory
from pecker_fast.unlearning import Compute, Phase, Placement, Problem, PromptRequest, Setting, method_class

from .run import conditions

# For trying the script without a GPU.
TINY = {
    **SD15,
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SIZES = {"sd15": SD15, "tiny": TINY}
REQUEST = PromptRequest(("a dog", "a cat"), ("a photo of somebody",), ("a photo of a man",))


def build(
    config: dict[str, Any], options: Any, method: str, device: torch.device, placement: Placement, precision: str
) -> Phase:
    """The last phase of a method on a network with random weights, ready for its first iteration."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    schedule = NoiseSchedule.linear()
    table = PromptTable(torch.randn(len(REQUEST.prompts), ARCHITECTURES[UNET].tokens, config["cross_attention_dim"]))
    teacher = TextConditioned(UNet2DConditionModel.from_config(config), table, schedule)
    compute = Compute(device=device, mixed_precision=precision, channels_last=device.type == "cuda")
    setting = Setting(Problem(teacher, schedule, REQUEST), compute, placement)
    phase = method_class(method)(setting, options).phases[-1]
    phase.start(None)
    return phase


def measure(phase: Phase, device: torch.device, iterations: int) -> dict[str, Any]:
    """Seconds of each iteration after a warm-up iteration, and the peak memory of all."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    phase.step(0)
    seconds = []
    for i in range(1, iterations + 1):
        synchronize()
        start = time.perf_counter()
        phase.step(i)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds), "peak_memory_bytes": peak_memory_bytes(device)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows; returns them with the conditions."""
    device = torch.device(args.device)
    placement = Placement(
        weights_dtype=getattr(torch, args.weights_dtype),
        teacher_dtype=torch.bfloat16,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    config, kind = SIZES[args.size], method_class(args.method)
    rows = []
    for batch in args.batch:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        options = dataclasses.replace(
            method_options("sd15-celebrity", kind),
            train_batch_size=batch,
            gradient_accumulation_steps=max(1, args.images // batch),
        )
        row: dict[str, Any] = {"size": args.size, "method": args.method, "batch": batch, "images": args.images}
        row |= {name: str(value) for name, value in dataclasses.asdict(placement).items()}
        try:
            phase = build(config, options, args.method, device, placement, args.precision)
            row |= measure(phase, device, args.iterations)
            del phase
        except torch.cuda.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
        if args.estimate:
            estimate = estimate_memory(
                kind,
                options,
                unet=config,
                latent_size=config["sample_size"],
                schedule=NoiseSchedule.linear(),
                request=REQUEST,
                placement=placement,
                mixed_precision=args.precision,
                low_embeddings=False,
                model=args.size,
            )
            row["estimated_bytes"] = estimate.peak
        rows.append(row)
        print(describe(row), flush=True)
    return {"conditions": conditions(device), "rows": rows}


def describe(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    if "error" in row:
        return f"{row['method']}, micro-batch {row['batch']}: {row['error']}"
    median = row["seconds"][len(row["seconds"]) // 2]
    estimate = f", estimated {row['estimated_bytes'] / 2**30:.2f}" if "estimated_bytes" in row else ""
    return (
        f"{row['method']}, micro-batch {row['batch']} of {row['images']}: {median:.3f} s an iteration, "
        f"{row['images'] / median:.2f} images a second, peak {row['peak_memory_bytes'] / 2**30:.2f} GiB{estimate}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="sd15", choices=SIZES)
    parser.add_argument("--method", default="pecker")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], help="samples of a micro-batch")
    parser.add_argument("--images", type=int, default=8, help="of an iteration, in micro-batches")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--weights_dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--estimate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    results = run(args)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
