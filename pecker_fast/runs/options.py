"""Arguments that subcommands share, and what they are resolved to."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ..files import write_json
from ..parallel import DEFAULT_TIMEOUT, World, local_rank, started_by_torchrun
from ..profiling import Profiler, Regions

# Types of arguments. A run or a model is given by its place, or by --pretrained-model-name-or-path; see run_or_model.
RunOrModel = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_MODEL")]
_PRESET = tyro.conf.arg(name="preset", aliases=("--preset-name",))
PresetName = Annotated[str, _PRESET]
OptionalPresetName = Annotated[str | None, _PRESET]

# What a run leaves in its folder, beside folders.
RUN_FILES = (
    "config.json",
    "train.jsonl",
    "evaluation.jsonl",
    "metrics.json",
    "environment.json",
    "evaluation.json",
    "drift.json",
    "mask.safetensors",
    "fisher.safetensors",
    "hashes.json",
    "report.md",
    "report.html",
    "report.png",
    "robustness.json",
    "robustness.md",
    "robustness.html",
    "robustness.png",
    "profile.txt",
    "profile.json",
    "trace.json",
    "model_index.json",
    "pipeline.py",
)


def device_of(name: str | None) -> torch.device:
    """The device of the argument ``device``; a GPU where there is one by default. ValueError where it is not there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no GPU here")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, expected cpu or cuda")
    return device


def check_output(output: str | Path) -> Path:
    """The file of the argument ``output``. ValueError where there is no folder for it."""
    if not Path(output).parent.is_dir():
        raise ValueError(f"output is {str(output)!r}, but there is no folder {str(Path(output).parent)!r}")
    return Path(output)


@dataclass(frozen=True)
class ComputeArguments:
    """Where and how to compute."""

    seed: int = 0
    """Of everything random."""
    device: str | None = None
    """cpu, cuda, cuda:1...; a GPU where there is one by default. Under torchrun each process takes its own GPU."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast over float32 weights; auto: bf16 on a GPU that has it, otherwise no."""
    channels_last: bool | None = None
    """Memory format of the networks; on a GPU by default."""
    torch_compile: bool = False
    """Compile the networks."""
    nonfinite: Literal["stop", "skip", "zero"] = "stop"
    """Losses or gradients that are inf or NaN: end the run, skip the step, or set these entries to 0."""
    profile: bool = False
    """Measure and print where the time of an iteration goes, images per second, energy and memory, and trace a few
    iterations (trace.json in the run's folder)."""
    ddp_timeout: int = DEFAULT_TIMEOUT
    """Seconds after which a process of a run under torchrun that does not answer is given up."""

    def resolved(self) -> "ComputeArguments":
        """With device, precision and memory format settled. Raises ValueError for a device that is not there."""
        device = device_of(self.device)
        if device.type == "cuda" and device.index is None and started_by_torchrun():
            if local_rank() >= torch.cuda.device_count():
                raise ValueError(
                    f"torchrun started process {local_rank()} on a machine with {torch.cuda.device_count()} GPUs: "
                    "start as many as there are (--nproc_per_node), or choose --device cpu"
                )
            device = torch.device("cuda", local_rank())
        if self.ddp_timeout < 1:
            raise ValueError(f"ddp_timeout is {self.ddp_timeout}, expected at least 1 second")
        precision = self.mixed_precision
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
        channels_last = device.type == "cuda" if self.channels_last is None else self.channels_last
        return dataclasses.replace(self, device=str(device), mixed_precision=precision, channels_last=channels_last)

    def as_setting(self) -> dict[str, Any]:
        """The arguments of ``Compute``, but for the profiler."""
        return {
            "seed": self.seed,
            "device": torch.device(self.device),
            "mixed_precision": self.mixed_precision,
            "channels_last": self.channels_last,
            "compile": self.torch_compile,
            "nonfinite": "propagate" if self.nonfinite == "stop" else self.nonfinite,
        }


@dataclass(frozen=True)
class DataArguments:
    """Real images: for pretraining and for evaluation only."""

    dataset_name: str | None = None
    """digits, cifar10, stl10 or folder:<path>; the preset's by default."""
    data_root: str | None = None
    """Folder with the files of cifar10 or stl10."""
    download: bool = False
    """Whether the files may be fetched from the internet."""


def run_or_model(run: str | None, name: str | None) -> str | None:
    """What was given by its place or by --pretrained-model-name-or-path. ValueError where both were."""
    if run is not None and name is not None:
        raise ValueError(
            f"pretrained_model_name_or_path is {name!r}, but {run!r} is given as well: expected one of the two"
        )
    return run if name is None else name


def run_config(folder: Path | None, key: str) -> dict[str, Any]:
    """config.json of a run of unlearning that says ``key``; empty where ``folder`` is that of anything else."""
    try:
        found = json.loads((folder / "config.json").read_text()) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return found if "options" in found and key in found else {}


def prepare_folder(folder: Path, resume: str | None, overwrite: bool) -> None:
    """Makes the folder of a run, or empties it where that was asked for.

    Raises ValueError where another run is in it and nothing says what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file, expected a folder")
    if resume is None and not overwrite and any((folder / name).exists() for name in ("config.json", "checkpoints")):
        raise ValueError(
            f"output_dir {folder} has a run already: go on with --resume_from_checkpoint latest, "
            "begin anew with --overwrite_output_dir, or choose another folder"
        )
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written to: {error}") from error
    if resume is None and overwrite:
        # Checkpoints of the earlier run would pass for this one's.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)


def profiler_of(compute: ComputeArguments, regions: Regions, folder: Path, world: World) -> Profiler | None:
    """What measures a run, where that was asked for; the main process writes the trace."""
    if not compute.profile:
        return None
    return Profiler(regions, compute.device, folder / "trace.json" if world.is_main else None)


def report_profile(profiler: Profiler | None, folder: Path, world: World) -> None:
    """Prints the profiler's table, and leaves profile.txt and profile.json in the folder of the run."""
    if profiler is None:
        return
    joules = world.total(profiler.joules)

    def write() -> None:
        table = profiler.table(joules)
        (folder / "profile.txt").write_text(table + "\n")
        write_json(folder / "profile.json", profiler.summary(joules))
        print(table)

    world.on_main(write)
