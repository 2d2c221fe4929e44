"""The training of a run: the loop over its phases with log, profiler and checkpoints, until it ends or is stopped."""

import shlex
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..files import write_json, write_text
from ..parallel import World, command_words
from ..profiling import Profiler, Regions
from ..training.loop import Loop, LoopOptions, Progress
from ..training.tracking import tracker
from ..unlearning import Phase
from .arguments import ComputeArguments, OutputArguments
from .history import record_event, started_words


@dataclass(frozen=True)
class Running:
    """A run that is ready to train.

    Parameters
    ----------
    phases : sequence of Phase
        What is trained, in order.
    folder : Path
        Of the run.
    loop, compute, output
        Options of the run; ``compute`` resolved.
    world, regions
        Processes and profiler regions that the phases were made with.
    command : list of str
        Words of the command line that would start the run: how to resume it, if it was started from Python.
    """

    phases: Sequence[Phase]
    folder: Path
    loop: LoopOptions
    compute: ComputeArguments
    output: OutputArguments
    world: World
    regions: Regions
    command: list[str]

    def train(
        self,
        fingerprint: dict[str, Any],
        *,
        begin: Callable[[], None],
        evaluate: Callable[[nn.Module, int], dict[str, Any] | None] | None = None,
        export: Callable[[nn.Module, Path], None] | None = None,
    ) -> Progress:
        """Run all phases, and return the progress at the end.

        Parameters
        ----------
        fingerprint : dict
            JSON that says which run this is: checkpoints of another one are refused.
        begin : callable
            Called on the main process after the checkpoint to resume from has been read, before training.
        evaluate, export : callable, optional
            As ``Loop`` takes them.

        Raises
        ------
        SystemExit
            With status 128 + n if signal n stopped the run, after a checkpoint.
        """
        is_main = self.world.is_main
        profiler = None
        if self.compute.profile:
            profiler = Profiler(self.regions, self.compute.device, self.folder / "trace.json" if is_main else None)
        with tracker(self.output.report_to if is_main else "none", self.folder) as on_log:
            loop = Loop(
                self.phases,
                self.folder,
                self.loop,
                fingerprint,
                evaluate=evaluate,
                export=export,
                on_log=on_log,
                stop_at_nonfinite=self.compute.nonfinite == "stop",
                show_progress=self.output.progress_bar,
                world=self.world,
                profiler=profiler,
            )
            loop.prepare()

            def start() -> None:
                step = loop.progress.step
                begin()
                record_event(self.folder, "resumed" if step else "started", step, started_words(self.command))

            self.world.on_main(start)
            progress = loop.run()
        if progress.stopped_by is not None:
            if is_main:
                print(how_to_resume(progress, self.command))
            raise SystemExit(128 + progress.stopped_by)
        if profiler is not None:
            self._write_profile(profiler)
        return progress

    def _write_profile(self, profiler: Profiler) -> None:
        joules = self.world.total(profiler.joules)

        def write() -> None:
            table = profiler.table(joules)
            write_text(self.folder / "profile.txt", table + "\n")
            write_json(self.folder / "profile.json", profiler.summary(joules))
            print(table)

        self.world.on_main(write)


def how_to_resume(progress: Progress, command: list[str]) -> str:
    """The command that resumes a run that a signal stopped: the one it was started with, or ``command`` if that was
    another one (a test, or Python)."""
    name = signal.Signals(progress.stopped_by).name
    overwrite = ("--overwrite_output_dir", "--overwrite-output-dir")
    words = [*command_words(), *(word for word in started_words(command) if word not in overwrite)]
    words += ["--resume_from_checkpoint", "latest"]
    return f"{name}: stopped after step {progress.step}, with a checkpoint. Continue with\n  {shlex.join(words)}"
