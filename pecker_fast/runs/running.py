"""What the subcommands that train methods have in common: the loop over a method's phases, and stopping."""

import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..models import save_result
from ..parallel import World, command_words
from ..profiling import Regions
from ..training.loop import Loop, LoopOptions, Progress
from ..training.tracking import tracker
from ..unlearning import Method
from .options import ComputeArguments, profiler_of


@dataclass(frozen=True)
class Running:
    """A run of a method, ready to begin.

    Parameters
    ----------
    method: what is run.
    folder: of the run.
    loop, compute: arguments, ``compute`` resolved.
    world, regions: processes and profiler of the method's setting.
    report_to, progress_bar: of the request.
    command: words of the command line that would begin it.
    export: whether checkpoints hold the network too, for use as it is.
    """

    method: Method
    folder: Path
    loop: LoopOptions
    compute: ComputeArguments
    world: World
    regions: Regions
    report_to: str
    progress_bar: bool
    command: list[str]
    export: bool = True

    def run(
        self,
        fingerprint: dict[str, Any],
        evaluate: Callable[[nn.Module, int], dict[str, Any] | None] | None,
        before: Callable[[], None],
    ):
        """Runs all phases; returns the progress and the profiler, or None.

        ``fingerprint``: which run this is; ``evaluate``: as ``Loop`` takes it; ``before``: done on the main process
        once the checkpoint to go on from has been read. Raises SystemExit 128 + n where signal n ended the run.
        """

        def export(averaged: nn.Module, target: Path) -> None:
            schedule = self.method.setting.problem.schedule
            save_result(target, averaged, schedule, self.method.sampler.t_init)

        profiler = profiler_of(self.compute, self.regions, self.folder, self.world)
        with tracker(self.report_to if self.world.is_main else "none", self.folder) as on_log:
            loop = Loop(
                self.method.phases,
                self.folder,
                self.loop,
                fingerprint,
                stop_at_nonfinite=self.compute.nonfinite == "stop",
                evaluate=evaluate,
                export=export if self.export else None,
                on_log=on_log,
                show_progress=self.progress_bar,
                world=self.world,
                profiler=profiler,
            )
            loop.prepare()
            self.world.on_main(before)
            progress = loop.run()
        if progress.stopped_by is not None:
            if self.world.is_main:
                say_how_to_resume(progress, self.command)
            raise SystemExit(128 + progress.stopped_by)
        return progress, profiler


def say_how_to_resume(progress: Progress, otherwise: list[str]) -> None:
    """Prints the command that goes on with a run that a signal ended; ``otherwise`` where no command line began it."""
    name = signal.Signals(progress.stopped_by).name
    given = [word for word in sys.argv[1:] if word not in ("--overwrite_output_dir", "--overwrite-output-dir")]
    words = [*command_words(), *(given if given[:1] == otherwise[:1] else otherwise)]
    words += ["--resume_from_checkpoint", "latest"]
    print(f"{name}: stopped after step {progress.step}, with a checkpoint. Go on with\n  {shlex.join(words)}")
