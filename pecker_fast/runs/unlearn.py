"""One run of unlearning or distillation, from its options to its report, step by step."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_json
from ..mask import SaliencyMask
from ..names import running_with
from ..parallel import World, process_number, world
from ..training.loop import Progress
from ..unlearning import method_class
from .arguments import ComputeArguments, UnlearnArguments, option_words
from .audit import record_result, record_weights
from .distilled import distillation_for, is_distilled, with_distilled
from .folder import check_folder, owning, prepare_folder
from .running import Running
from .several import resumed
from .task import Task, task_of


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Parameters
    ----------
    metrics : dict
        What metrics.json holds. Under torchrun only on the main process; empty on the others.
    before : Tensor or None
        Samples of the pretrained network, for another run on the same network, seed and number of samples.
    """

    metrics: dict[str, Any]
    before: Tensor | None


def unlearn(args: UnlearnArguments, before: Tensor | None = None) -> Outcome:
    """Make a pretrained network forget, distil it first if the method needs that, and write the folder of the run.

    Parameters
    ----------
    args : UnlearnArguments
        All options.
    before : Tensor, optional
        ``Outcome.before`` of an earlier run on the same network, seed and number of samples, so that the pretrained
        network need not draw them again.

    Returns
    -------
    Outcome
        What was measured.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before training begins.
    SystemExit
        With status 128 + n if signal n stopped the run, after a checkpoint.
    """
    asked, args = args, with_distilled(args)
    compute = args.compute.resolved()
    with world(torch.device(compute.device), compute.ddp_timeout) as processes:
        if args.request.distilled is not None and not is_distilled(args.request.distilled):
            _distil_first(args, compute, processes)
            args = with_distilled(asked)
        return _carry_out(args, compute, processes, before)


def distil(args: UnlearnArguments) -> Outcome:
    """Distil a pretrained network into a one-step generator and its score network, and write the folder of the run.

    Parameters
    ----------
    args : UnlearnArguments
        All options, as ``distil_arguments`` makes them.

    Returns
    -------
    Outcome
        What was measured.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before training begins.
    SystemExit
        With status 128 + n if signal n stopped the run, after a checkpoint.
    """
    if method_class(args.method).forgets:
        raise ValueError(f"method is {args.method!r}, which forgets: pecker-fast unlearn is its command")
    args = with_distilled(args)
    compute = args.compute.resolved()
    with world(torch.device(compute.device), compute.ddp_timeout) as processes:
        return _carry_out(args, compute, processes)


def _distil_first(args: UnlearnArguments, compute: ComputeArguments, processes: World) -> None:
    """Distil the network that a run needs distilled, once the options of the run have been checked."""
    kind, first = task_of(args), resumed(distillation_for(args))
    kind.check(args)
    request = dataclasses.replace(args.request, distilled=None)
    kind(dataclasses.replace(args, request=request), compute, processes)
    folder, resume, overwrite = args.folder, args.loop.resume_from_checkpoint, args.output.overwrite_output_dir
    processes.on_main(lambda: check_folder(folder, resume, overwrite))
    if processes.is_main:
        print(
            f"{args.method} starts from a distilled generator, and there is none of this network yet: "
            f"{first.options.max_train_steps} iterations of distillation, which are kept in {first.folder}"
        )
    # The words of the command are about the run itself.
    with running_with(()):
        _carry_out(first, first.compute.resolved(), processes)


def _carry_out(
    args: UnlearnArguments, compute: ComputeArguments, processes: World, before: Tensor | None = None
) -> Outcome:
    """Train, measure, save and report; ``compute``: resolved."""
    with owning(args.folder) as take:
        return _carry_out_alone(args, compute, processes, before, take)


def _carry_out_alone(
    args: UnlearnArguments, compute: ComputeArguments, processes: World, before: Tensor | None, take: Callable[[], None]
) -> Outcome:
    """``_carry_out``; ``take`` locks the folder against other processes."""
    kind = task_of(args)
    folder, resume, overwrite = args.folder, args.loop.resume_from_checkpoint, args.output.overwrite_output_dir
    args.loop.check()
    args.output.check()
    if torch.cuda.is_initialized():
        # The peak of an earlier run of this process is not this run's.
        torch.cuda.reset_peak_memory_stats()
    processes.on_main(lambda: check_folder(folder, resume, overwrite))
    # Before anything is loaded, if there is a folder.
    processes.on_main(take)

    # What to forget, of which network, by which method. Only prompts that were encoded have been written so far.
    task = kind(args, compute, processes)
    method = method_class(args.method)(task.setting, args.options)
    processes.on_main(lambda: task.prepare(method))
    processes.on_main(lambda: prepare_folder(folder, resume, overwrite, take))

    # Train.
    shared: list[Tensor | None] = [None]

    def begin() -> None:
        config = {**kind.describe(args), **task.hashes, **task.config(), "num_processes": processes.size}
        write_json(folder / "config.json", config)
        shared[0] = task.draw_before(before)

    words = [kind.command, "--preset", args.preset, *(["--method", args.method] if method.forgets else [])]
    words += option_words(args, kind.defaults(args.preset, args.method))
    running = Running(
        method.phases, folder, args.loop, compute, args.output, processes, task.setting.compute.regions, words
    )
    progress = running.train(
        task.fingerprint(),
        begin=begin,
        evaluate=task.evaluate if task.evaluates else None,
        export=task.export,
    )

    # Measure, save and report.
    metrics: dict[str, Any] = {}

    def finish(network: nn.Module, mask: SaliencyMask | None, progress: Progress) -> None:
        network = task.result(network)
        metrics.update(method=args.method, seed=compute.seed, pretrained=task.source, **method.sampler.summary())
        metrics.update(task.finish(network, progress))
        metrics.update(record_weights(folder, network, task.start(), mask))
        record_result(folder, metrics, args.options.ema_decay, progress, task.setting.compute.device)

    # Every process takes part: the weights may be sharded.
    last = method.phases[-1]
    mask = last.last_mask()
    with last.averaged() as network:
        processes.on_main(lambda: finish(network, mask, progress))
    return Outcome(metrics, shared[0])


def describe(args: UnlearnArguments, kind: type[Task] | None = None) -> str:
    """What a run would do (``--dry_run``): its configuration as JSON, and below it an estimate of its memory if any.

    Everything is checked that the run would check. What it needs beside ``args`` is named on stderr.

    Parameters
    ----------
    args : UnlearnArguments
        All options.
    kind : type, optional
        The task of the run. Default: that of ``args``.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        If an option is wrong, or a network or a file is missing.
    """
    args = with_distilled(args)
    kind, compute = kind or task_of(args), args.compute.resolved()
    kind.check(args)
    check_folder(args.folder, args.loop.resume_from_checkpoint, args.output.overwrite_output_dir)
    request = args.request
    if request.distilled is not None and not is_distilled(request.distilled):
        # It is made first.
        distillation = distillation_for(args)
        with running_with(()):
            task_of(distillation).check(distillation)
        request = dataclasses.replace(request, distilled=None)
    notes = kind.rehearse(dataclasses.replace(args, request=request), compute)
    memory = kind.estimate(args)
    if process_number() == 0:
        for note in notes:
            print(f"pecker-fast: {note}", file=sys.stderr)
    return json.dumps(kind.describe(args), indent=1) + ("" if memory is None else f"\n{memory}")
