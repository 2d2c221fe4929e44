"""The options of a run, in groups: what all runs share. A task adds its own (``Task.defaults``)."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ..checks import check_int, check_left_out, check_utf8
from ..names import nearest
from ..parallel import DEFAULT_TIMEOUT, World, local_rank, started_by_torchrun
from ..profiling import Regions
from ..training.loop import LoopOptions
from ..training.tracking import check_tracker
from ..unlearning import Compute
from .recorded import usual_folder

T = TypeVar("T")


@dataclass(frozen=True)
class OutputArguments:
    """Where the result goes, and what is shown meanwhile."""

    output_dir: str | None = None
    """Folder of the run. Default: runs/<preset>-<method>-seed<seed>."""
    overwrite_output_dir: bool = False
    """Start over in a folder that already has a run."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Log to a tracker as well as to train.jsonl. wandb: WANDB_MODE=offline logs into the folder alone."""
    progress_bar: bool = True
    """Show a progress bar."""
    dry_run: bool = False
    """Print the resolved configuration and exit; for a text-to-image model with an estimate of the memory."""

    def check(self) -> None:
        """Check the options. ValueError if the folder has no name, or the tracker is missing."""
        if self.output_dir == "":
            raise ValueError("output_dir is empty, expected the name of a folder")
        check_tracker(self.report_to)

    def describe(self) -> dict[str, Any]:
        """The part of it that config.json holds, as JSON; the folder is the caller's to add."""
        return {"report_to": self.report_to}


@dataclass(frozen=True)
class ComputeArguments:
    """Where and how to compute."""

    seed: int = 0
    """Seed of everything random."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: a GPU if there is one. Under torchrun each process takes its own GPU."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast over float32 weights. auto: bf16 on GPUs that support it, for pretraining on mnist on processors too,
    otherwise no."""
    channels_last: bool | None = None
    """Keep the networks in the channels_last memory format. Default: on a GPU."""
    torch_compile: bool = False
    """Compile the networks."""
    nonfinite: Literal["stop", "skip", "zero"] = "stop"
    """If a loss or a gradient is inf or NaN: stop the run, skip the step, or set these entries to 0."""
    profile: bool = False
    """Measure and print the time of each part of an iteration, images per second, energy and memory, and trace a few
    iterations (trace.json in the run's folder)."""
    ddp_timeout: int = DEFAULT_TIMEOUT
    """Seconds after which a run under torchrun gives up on a process that does not answer."""

    def resolved(self, cpu_bf16: bool = False) -> "ComputeArguments":
        """Settle device, precision and memory format.

        Parameters
        ----------
        cpu_bf16 : bool
            Whether the precision "auto" is bf16 on a processor that multiplies in it.

        Raises
        ------
        ValueError
            If the device does not exist, or ``ddp_timeout`` is out of range.
        """
        device = device_of(self.device)
        if device.type == "cuda" and device.index is None and started_by_torchrun():
            if local_rank() >= torch.cuda.device_count():
                raise ValueError(
                    f"torchrun started process {local_rank()} on a machine with {torch.cuda.device_count()} GPUs: "
                    "start one process a GPU (--nproc_per_node), or choose --device cpu"
                )
            device = torch.device("cuda", local_rank())
        check_int("seed", self.seed, 0)
        if self.ddp_timeout < 1:
            raise ValueError(f"ddp_timeout is {self.ddp_timeout}, expected at least 1 second")
        precision = self.mixed_precision
        if precision == "auto":
            cuda = device.type == "cuda"
            fast = torch.cuda.is_bf16_supported() if cuda else cpu_bf16 and multiplies_in_bf16()
            precision = "bf16" if fast else "no"
        channels_last = device.type == "cuda" if self.channels_last is None else self.channels_last
        return dataclasses.replace(self, device=str(device), mixed_precision=precision, channels_last=channels_last)

    def as_compute(self, world: World) -> Compute:
        """How a method computes, with the processes of the run; of resolved arguments."""
        return Compute(
            seed=self.seed,
            device=torch.device(self.device),
            mixed_precision=self.mixed_precision,
            channels_last=self.channels_last,
            compile=self.torch_compile,
            nonfinite="propagate" if self.nonfinite == "stop" else self.nonfinite,
            regions=Regions(self.profile, self.device),
            world=world,
        )


@dataclass(frozen=True)
class DataArguments:
    """Real images: for pretraining, for evaluation, and for the methods that train on them."""

    dataset_name: str | None = None
    """digits, mnist, cifar10, stl10 or folder:<path>. Default: the preset's."""
    data_root: str | None = None
    """Folder with the files of cifar10 or stl10."""
    download: bool = False
    """Download the files if they are missing."""


@dataclass(frozen=True)
class UnlearnArguments:
    """All options of a run of unlearning; ``Task.defaults`` makes them for a preset and a method.

    Parameters
    ----------
    preset : str
        Name of a preset.
    method : str
        Name of a method.
    options : dataclass
        Options of the method, an instance of its ``Options``.
    request : dataclass
        What to forget, of which network, and how the result is measured: the task's own options.
    resources : dataclass
        What the run may use: real images (classes), or how memory is saved (prompts).
    compute, loop, output
        Options that all runs have.
    """

    preset: str
    method: str
    options: Any
    request: Any
    resources: Any
    compute: ComputeArguments = field(default_factory=ComputeArguments)
    loop: LoopOptions = field(default_factory=LoopOptions)
    output: OutputArguments = field(default_factory=OutputArguments)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output.output_dir or usual_folder(self.preset, self.method, self.compute.seed))


def device_of(name: str | None) -> torch.device:
    """The device called ``name``; by default a GPU if there is one.

    Raises
    ------
    ValueError
        If there is no such device here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected cpu, cuda, or a GPU by its number such as cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no GPU here")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, expected cpu or cuda")
    return device


def multiplies_in_bf16() -> bool:
    """Whether the processor has instructions for products in bfloat16 (AMX or AVX-512 BF16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def check_output(
    output: str | os.PathLike,
    suffix: str = "",
    kind: str = "",
    read: Callable[[Path], object] | None = None,
    *,
    name: str = "output",
) -> Path:
    """The path of a file to write.

    Parameters
    ----------
    output : path-like
        The file.
    suffix : str
        What its name ends with, such as ".png".
    kind, read : str and callable, optional
        What the file is to be, such as "a mask", and a function that raises ValueError for other files: an existing
        file is replaced only if it is one. Default: any file is.
    name : str
        The option.

    Raises
    ------
    ValueError
        If its folder does not exist, it is a folder itself, its name is not UTF-8 or ends otherwise, or a file of
        another kind would be lost.
    """
    path, shown = Path(output), f"{name} is {str(output)!r}"
    check_utf8(name, path.absolute())
    if not str(output).endswith(suffix):
        raise ValueError(f"{shown}, expected a file that ends with {suffix}")
    if not path.parent.is_dir():
        raise ValueError(f"{shown}, but there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"{shown}, which is a folder: expected the name of a file")
    if read is not None and path.exists():
        try:
            read(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{shown}, which exists already and is not {kind}: expected another name") from error
    return path


def check_unused(function: Callable[..., Any], values: Mapping[str, Any], names: Iterable[str], why: str) -> None:
    """Check that options which would not be used are not set.

    Parameters
    ----------
    function : callable
        Whose parameters the options are.
    values : Mapping
        Their values by name.
    names : iterable of str
        The options that are not used.
    why : str
        Why not, for the message.

    Raises
    ------
    ValueError
        If one of them differs from its default.
    """
    defaults = {name: item.default for name, item in signature(function).parameters.items()}
    check_left_out(values, defaults, sorted(names), why)


def option_groups(args: Any) -> dict[str, str | None]:
    """Name of every option of ``args`` to the field that holds it: a group, or None for a field of its own."""
    names: dict[str, str | None] = {}
    for item in dataclasses.fields(args):
        value = getattr(args, item.name)
        if dataclasses.is_dataclass(value):
            names |= {inner.name: item.name for inner in dataclasses.fields(value)}
        else:
            names[item.name] = None
    return names


def with_options(args: T, values: Mapping[str, Any]) -> T:
    """``args`` with some options replaced, whichever group they are in.

    Parameters
    ----------
    args : dataclass
        Options, some of them in groups (fields that are dataclasses themselves).
    values : Mapping
        Values by name, as the command line calls the options.

    Returns
    -------
    dataclass
        Of the same type.

    Raises
    ------
    TypeError
        If there is no option of a name; the message names the nearest one.
    """
    groups = option_groups(args)
    changes: dict[str | None, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in groups:
            raise TypeError(f"there is no option {name!r}{nearest(name, groups)}")
        changes.setdefault(groups[name], {})[name] = tuple(value) if isinstance(value, list) else value
    own = changes.pop(None, {})
    inner = {group: dataclasses.replace(getattr(args, group), **changed) for group, changed in changes.items()}
    return dataclasses.replace(args, **inner, **own)


def option_words(args: Any, default: Any) -> list[str]:
    """The options in which ``args`` differs from ``default``, as words of the command line."""
    words: list[str] = []
    for name, group in option_groups(args).items():
        value, usual = (getattr(x if group is None else getattr(x, group), name) for x in (args, default))
        if value == usual:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words
