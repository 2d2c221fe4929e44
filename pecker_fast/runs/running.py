"""The training of a run: the loop over its phases with log, profiler and checkpoints, until it ends or is stopped."""

import shlex
import signal
import sys
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
        with tracker(self.output.report_to if is_main else "none", self.folder, fingerprint) as on_log:
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
                if step < loop.total:
                    # The run has not ended, even if a shorter one has.
                    (self.folder / "metrics.json").unlink(missing_ok=True)
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
    """The command that resumes a run that a signal stopped.

    It is the one that the process was started with; ``command`` if that was none of ours (a test, or Python). Commands
    that make several runs continue by themselves when they are called again.
    """
    name = signal.Signals(progress.stopped_by).name
    started = sys.argv[1:]
    ours = Path(sys.argv[0]).name in ("pecker-fast", "__main__.py") and bool(started)
    words = started if ours else command
    if words[0] == command[0]:
        words = [*without_options(words, ("resume_from_checkpoint", "overwrite_output_dir"))]
        words += ["--resume_from_checkpoint", "latest"]
    elif words[0] == "demo" and "--resume" not in words:
        words = [*words, "--resume"]
    line = shlex.join([*command_words(), *words])
    return f"{name}: stopped after step {progress.step}, with a checkpoint. Continue with\n  {line}"


def without_options(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Words of the command line without some options that have one value or none."""
    kept: list[str] = []
    skip = False
    for word in words:
        written, equals, _ = word.partition("=")
        is_option = written.startswith("--") and written[2:].replace("-", "_") in names
        if not is_option and not (skip and not word.startswith("--")):
            kept.append(word)
        skip = is_option and not equals and not written.replace("-", "_").startswith("--overwrite")
    return kept
