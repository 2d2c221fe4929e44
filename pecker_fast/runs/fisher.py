"""The Fisher information of a Stable Diffusion as a file, for unlearning with ``selective_amnesia``."""

import dataclasses
from pathlib import Path

import torch

from ..files import write_json
from ..parallel import world
from ..unlearning.selective_amnesia import FisherInformation
from .arguments import UnlearnArguments, option_words
from .fisher_file import FisherFacts, save_fisher
from .folder import check_folder, owning, prepare_folder
from .prompts.task import PromptTask
from .recorded import usual_folder
from .running import Running

METHOD = "selective_amnesia"
FILE = "fisher.safetensors"


class FisherTask(PromptTask):
    """A run that makes the file, and so takes none."""

    @staticmethod
    def _check_fisher(args: UnlearnArguments) -> None:
        if args.request.fisher is not None:
            raise ValueError(f"fisher is {args.request.fisher!r}, but this command makes the file: expected none")


def fisher_arguments(preset: str) -> UnlearnArguments:
    """The options of ``fisher`` on a preset: those of selective_amnesia with all parameters trained."""
    args = PromptTask.defaults(preset, METHOD)
    output = dataclasses.replace(args.output, output_dir=usual_folder(preset, "fisher", args.compute.seed))
    return dataclasses.replace(args, output=output, options=dataclasses.replace(args.options, trained="all"))


def fisher(args: UnlearnArguments) -> Path | None:
    """Compute the Fisher information of a model on images that it draws of prompts to keep.

    It does not depend on the concept: one file serves all runs on the model.

    Parameters
    ----------
    args : UnlearnArguments
        As ``fisher_arguments`` makes them.

    Returns
    -------
    Path or None
        fisher.safetensors in the folder of the run; under torchrun None on all processes but the main one.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before anything is computed.
    SystemExit
        With status 128 + n if signal n stopped the run, after a checkpoint.
    """
    if args.options.trained != "all":
        raise ValueError(f'trained is {args.options.trained!r}, expected "all": one file serves every choice')
    compute, folder = args.compute.resolved(), args.folder
    resume, overwrite = args.loop.resume_from_checkpoint, args.output.overwrite_output_dir
    args.loop.check()
    args.output.check()
    with world(torch.device(compute.device), compute.ddp_timeout) as processes, owning(folder) as take:
        processes.on_main(lambda: check_folder(folder, resume, overwrite))
        processes.on_main(take)
        task = FisherTask(args, compute, processes)
        method = FisherInformation(task.setting, args.options)
        processes.on_main(lambda: prepare_folder(folder, resume, overwrite, take))

        def begin() -> None:
            config = {**task.describe(args), **task.hashes, "num_processes": processes.size}
            write_json(folder / "config.json", config)

        words = ["fisher", "--preset", args.preset, *option_words(args, fisher_arguments(args.preset))]
        running = Running(
            method.phases, folder, args.loop, compute, args.output, processes, task.setting.compute.regions, words
        )
        running.train({**task.fingerprint(), "phases": "fisher"}, begin=begin)
        facts = FisherFacts(
            task.hashes["pretrained_sha256"],
            args.options.loss_reduction,
            method.phases[-1].samples,
            args.options.fisher_timesteps,
        )
        processes.on_main(lambda: save_fisher(folder / FILE, method.fisher(), facts))
        return folder / FILE if processes.is_main else None
