"""``pecker-fast fisher``: the Fisher information of a Stable Diffusion, which selective_amnesia takes, as a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..parallel import World, world
from ..unlearning.selective_amnesia import FisherInformation
from .fisher_file import FisherFacts, save_fisher
from .options import ComputeArguments, report_profile
from .running import Running
from .unlearn_text import UnlearnTextArguments, load_text_setting

METHOD = "selective_amnesia"
FILE = "fisher.safetensors"


def fisher_arguments(preset: str) -> UnlearnTextArguments:
    """The arguments of ``fisher`` on a preset: those of selective_amnesia, of all parameters."""
    found = UnlearnTextArguments.defaults(preset, METHOD)
    request = dataclasses.replace(found.request, output_dir=f"runs/{preset}-fisher-seed{found.compute.seed}")
    return dataclasses.replace(found, request=request, options=dataclasses.replace(found.options, trained="all"))


def fisher(args: UnlearnTextArguments) -> Path | None:
    """Draws what is to stay with the pretrained model, and leaves its Fisher information in fisher.safetensors of the
    run's folder; returns that file's path (under torchrun on the main process; None on the others). It serves every
    concept.

    Raises ValueError or TypeError for wrong arguments, before anything is written; SystemExit 128 + n where signal n
    ended the run, after a checkpoint.
    """
    if args.options.trained != "all":
        raise ValueError(f'trained is {args.options.trained!r}, expected "all": the file serves every choice')
    if args.request.fisher is not None:
        raise ValueError(f"fisher is {args.request.fisher!r}, but it is what is to be made: expected none")
    compute = args.compute.resolved()
    with world(torch.device(compute.device), compute.ddp_timeout) as processes:
        return _fisher(args, compute, processes)


def _fisher(args: UnlearnTextArguments, compute: ComputeArguments, processes: World) -> Path | None:
    loaded = load_text_setting(args, compute, processes)
    method, folder, request = FisherInformation(loaded.setting, args.options), args.output_dir, args.request

    def describe() -> None:
        said: dict[str, Any] = {**args.describe(), **loaded.hashes, "num_processes": processes.size}
        write_json(folder / "config.json", said)

    words = ["fisher", "--preset", args.preset, "--output_dir", str(folder)]
    words += ["--pretrained_model_name_or_path", str(request.pretrained_model_name_or_path)]
    running = Running(
        method,
        folder,
        args.loop,
        compute,
        processes,
        loaded.setting.compute.regions,
        request.report_to,
        request.progress_bar,
        words,
        export=False,
    )
    _, profiler = running.run({**loaded.fingerprint, "phases": "fisher"}, None, describe)
    report_profile(profiler, folder, processes)
    facts = FisherFacts(
        loaded.hashes["pretrained_sha256"],
        args.options.loss_reduction,
        method.phases[-1].samples,
        args.options.fisher_timesteps,
    )
    processes.on_main(lambda: save_fisher(folder / FILE, method.fisher(), facts))
    return folder / FILE if processes.is_main else None


def run_fisher(args: UnlearnTextArguments) -> None:
    """The subcommand: prints the configuration, or computes and says where the file is."""
    if args.request.dry_run:
        args.loop.check()
        print(json.dumps(args.describe(), indent=1))
        return
    path = fisher(args)
    if path is not None:
        print(f"Fisher information: {path}")
