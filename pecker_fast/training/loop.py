"""The loop: runs phases in order, logs, evaluates, saves checkpoints, and stops on a signal."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checks import check_int
from ..files import append_line, write_text
from ..parallel import World
from ..profiling import Profiler
from ..records import COUNT, read_lines
from ..unlearning import Phase
from .checkpoints import CheckpointError, Checkpoints

# Figures of an evaluation that the progress bar shows, by key; percent.
FIGURES = {"ua": "UA", "retain_accuracy": "retained"}


class Logged(TypedDict):
    """A line of train.jsonl or evaluation.jsonl: what resuming needs of it."""

    step: COUNT


class NonFiniteError(RuntimeError):
    """A loss or a weight became inf or NaN."""


@dataclass(frozen=True)
class LoopOptions:
    """How often a run logs, evaluates and saves checkpoints."""

    logging_steps: int = 10
    """Steps between lines of train.jsonl."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; one more is written at the end."""
    checkpoints_total_limit: int | None = None
    """How many checkpoints to keep; all by default."""
    resume_from_checkpoint: str | None = None
    """Resume from a checkpoint: "latest" (the run starts from the beginning if there is none), "checkpoint-100" or a
    path. Only max_train_steps may be larger, and logging, evaluating and saving may change."""
    validation_steps: int = 500
    """Steps between evaluations."""

    def check(self) -> None:
        """Check all options. ValueError or TypeError, naming the option, if one is out of range."""
        for name in ("logging_steps", "checkpointing_steps", "validation_steps"):
            check_int(name, getattr(self, name), 1)


@dataclass
class Progress:
    """How far a run has come.

    Parameters
    ----------
    phase : int
        Index of the phase.
    iteration : int
        Iterations within the phase.
    step : int
        Iterations of all phases.
    images : int
        Images of all iterations.
    seconds : float
        Time spent in training, without evaluations and checkpoints.
    stopped_by : int, optional
        Number of the signal that stopped the run.
    """

    phase: int = 0
    iteration: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    stopped_by: int | None = None


def _short(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3g}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list that collects SIGTERM and Ctrl-C, for the run to end after an iteration. A second Ctrl-C ends it at
    once."""
    caught: list[int] = []

    def stop(number, _frame) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                before[number] = signal.signal(number, stop)
            except ValueError:
                # Only the main thread may set handlers; in another thread, its owner decides.
                break
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Loop:
    """Runs phases in ``folder``.

    Parameters
    ----------
    phases : sequence of Phase
        In order.
    folder : Path
        Folder of the run, for train.jsonl, evaluation.jsonl and checkpoints/.
    options : LoopOptions
        How often to log, evaluate and save.
    fingerprint : dict
        JSON that identifies the run. Checkpoints of other runs are refused.
    evaluate : callable, optional
        Takes a phase's averaged network and the step; returns a record for evaluation.jsonl, or None. Only the main
        process's is called; the others need none.
    export : callable, optional
        Writes a phase's averaged network into a checkpoint's folder. Only the main process's is called; either all
        processes have one or none.
    on_log : callable, optional
        Called with every line of train.jsonl and evaluation.jsonl.
    stop_at_nonfinite : bool
        Whether the run ends when a loss or a weight is inf or NaN; the last good checkpoint is kept.
    show_progress : bool
        Whether to show a progress bar.
    world : World, optional
        The processes of the run. The main one writes, evaluates and shows progress.
    profiler : Profiler, optional
        Measures the iterations.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        folder: Path,
        options: LoopOptions,
        fingerprint: dict[str, Any],
        *,
        evaluate: Callable[[nn.Module, int], dict[str, Any] | None] | None = None,
        export: Callable[[nn.Module, Path], None] | None = None,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        stop_at_nonfinite: bool = True,
        show_progress: bool = True,
        world: World | None = None,
        profiler: Profiler | None = None,
    ) -> None:
        options.check()
        self.world, self.profiler = world or World(), profiler
        self.phases, self.folder, self.options = list(phases), Path(folder), options
        self.checkpoints = Checkpoints(self.folder / "checkpoints", options.checkpoints_total_limit, fingerprint)
        self.evaluate, self.export, self.on_log = evaluate, export, on_log
        self.stop_at_nonfinite = stop_at_nonfinite
        self.show_progress = show_progress and self.world.is_main
        self.total = sum(phase.iterations for phase in self.phases)
        self.progress = Progress()
        self._window: dict[str, Tensor] = {}
        self._window_steps = 0
        self._since = 0.0
        self._prepared = False
        # What the bar shows: the last losses, and the last UA.
        self._losses: dict[str, str] = {}
        self._figures: dict[str, str] = {}

    def run(self) -> Progress:
        """Run to the end or until a signal, and save a checkpoint.

        Returns
        -------
        Progress
            Its ``stopped_by`` is set if a signal ended the run.

        Raises
        ------
        NonFiniteError
            If a loss or a weight is inf or NaN.
        CheckpointError
            If the checkpoint to resume from cannot be used.
        """
        p = self.progress
        self.prepare()
        bar = tqdm(total=self.total, initial=p.step, unit="it", disable=not self.show_progress, dynamic_ncols=True)
        if self.profiler is not None:
            self.profiler.start(self.total - p.step)
        with _signals() as caught, bar, self.world.watched():
            for index in range(p.phase, len(self.phases)):
                phase = self.phases[index]
                if index > p.phase or p.step == 0:
                    p.phase, p.iteration = index, 0
                    phase.start(self.phases[index - 1] if index else None)
                bar.set_description(phase.name, refresh=False)
                self._continue()
                while p.iteration < phase.iterations and p.stopped_by is None:
                    self._iterate(phase, caught)
                    # UA first: a narrow terminal cuts the end off.
                    bar.set_postfix({**self._figures, **self._losses}, refresh=False)
                    bar.update()
                if p.stopped_by is not None:
                    break
            self._pause()
            self._checkpoint(self.phases[p.phase])
            if p.stopped_by is None:
                # The last evaluation and checkpoint may take long.
                p.stopped_by = self._signal(caught)
        if self.profiler is not None:
            self.profiler.pause()
            self.profiler.close()
        return p

    def prepare(self) -> None:
        """Load the checkpoint to resume from, or empty the logs. ``run`` does this unless it has been done.

        Raises
        ------
        CheckpointError
            If the checkpoint cannot be used. Nothing has been changed then.
        """
        if self._prepared:
            return
        p, which = self.progress, self.options.resume_from_checkpoint
        logs = [self.folder / "train.jsonl", self.folder / "evaluation.jsonl"]
        if which == "latest" and not self.checkpoints.steps():
            which = None
            self._note(f"{self.folder} has no checkpoint yet: the run starts from the beginning")
        if which is not None:
            step, state = self.checkpoints.load(which)
            if self.checkpoints.extended is not None:
                self._note(self.checkpoints.extended)
            p.phase, p.iteration, p.step = state["phase"], state["iteration"], step
            p.images, p.seconds = state["images"], state["seconds"]
            if not p.phase < len(self.phases):
                raise CheckpointError(f"checkpoint-{step} is in phase {p.phase}, this run has {len(self.phases)}")
            self.phases[p.phase].load_state_dict(state["state"])

        def trim() -> None:
            # Lines after the checkpoint will be written again.
            for path in logs:
                lines = [] if which is None else [line for line in read_lines(path, Logged) if line["step"] <= p.step]
                write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

        self.world.on_main(trim)
        self._prepared = True

    def _iterate(self, phase: Phase, caught: list[int]) -> None:
        p, o = self.progress, self.options
        losses = phase.step(p.iteration)
        for name, loss in losses.items():
            self._window[name] = self._window[name] + loss if name in self._window else loss
        self._window_steps += 1
        p.iteration += 1
        p.step += 1
        p.images += phase.images_per_iteration
        if self.profiler is not None:
            self.profiler.step(phase.images_per_iteration)
        p.stopped_by = self._signal(caught)
        last = p.iteration == phase.iterations or p.stopped_by is not None
        if p.step % o.logging_steps == 0 or last:
            self._log(phase)
        if not phase.is_preparation and (p.step % o.validation_steps == 0 or p.iteration == phase.iterations):
            self._evaluate_now(phase)
        if p.step % o.checkpointing_steps == 0:
            self._checkpoint(phase)

    def _signal(self, caught: list[int]) -> int | None:
        """The signal that any process has received: all of them stop after the same iteration."""
        return self.world.largest(caught[0] if caught else 0) or None

    def _pause(self) -> None:
        """Add the time since the last pause to the training time. Waits for the device."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.progress.seconds += now - self._since
        self._since = now
        if self.profiler is not None:
            self.profiler.pause()

    def _continue(self) -> None:
        """Continue after a pause."""
        self._since = time.perf_counter()
        if self.profiler is not None:
            self.profiler.resume()

    def _outside(self, name: str) -> AbstractContextManager:
        return nullcontext() if self.profiler is None else self.profiler.outside(name)

    def _means(self) -> dict[str, float]:
        """Mean losses since the last line of the log. Waits for the device. NonFiniteError if the run has to stop."""
        if not self._window:
            return {}
        window = torch.stack([loss.float() for loss in self._window.values()]) / self._window_steps
        self.world.average_([window])
        means = dict(zip(self._window, window.tolist(), strict=True))
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad and self.stop_at_nonfinite:
            raise NonFiniteError(f"{', '.join(bad)} became inf or NaN by step {self.progress.step}{self._last_good()}")
        return means

    def _last_good(self) -> str:
        steps = self.checkpoints.steps()
        if not steps:
            return "; there is no checkpoint yet: lower the learning rates or checkpointing_steps"
        return f"; {self.checkpoints.path(steps[-1])} is the last good checkpoint"

    def _log(self, phase: Phase) -> None:
        p, losses = self.progress, self._means()
        self._window, self._window_steps = {}, 0
        self._pause()
        # JSON has no NaN.
        losses = {name: value if math.isfinite(value) else None for name, value in losses.items()}
        place = {"phase": phase.name, "iteration": p.iteration, "step": p.step, "images": p.images}
        profile = {} if self.profiler is None else self.profiler.record()
        self._losses = {name.removeprefix("loss_"): _short(value) for name, value in losses.items()}
        self._write("train.jsonl", {**place, "seconds": p.seconds, **losses, **phase.describe(), **profile})
        self._continue()

    def _evaluate_now(self, phase: Phase) -> None:
        p = self.progress
        self._means()
        self._pause()

        def measure(network: nn.Module) -> None:
            record = self.evaluate(network, p.step)
            if record is not None:
                known = ((title, record.get(key)) for key, title in FIGURES.items())
                self._figures = {title: f"{value:.1f}%" for title, value in known if value is not None}
                self._write("evaluation.jsonl", {"step": p.step, "images": p.images, "seconds": p.seconds, **record})

        # The main process may be the only one with an evaluation.
        if self.world.largest(int(self.evaluate is not None)):
            with self._outside("evaluation"), phase.averaged() as network:
                self.world.on_main(lambda: measure(network))
        self._continue()

    def _note(self, text: str) -> None:
        """A line about the run on stderr, of the main process."""
        if self.world.is_main:
            print(f"pecker-fast: {text}", file=sys.stderr)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        append_line(self.folder / name, record)
        if self.on_log is not None:
            self.on_log(record)

    def _checkpoint(self, phase: Phase) -> None:
        p = self.progress
        if self.stop_at_nonfinite:
            self._means()
            # A process may have only a part of the weights: all stop together.
            if self.world.largest(int(not phase.is_finite())):
                raise NonFiniteError(f"a weight became inf or NaN by step {p.step}{self._last_good()}")
        self._pause()
        place = {"phase": p.phase, "iteration": p.iteration, "images": p.images, "seconds": p.seconds}
        with self._outside("checkpoints"):
            if self.export is not None:
                with phase.averaged() as network:
                    export = partial(self.export, network)
                    self.world.on_main(lambda: self.checkpoints.stage(p.step, export))
            # After the averaged weights have been swapped out again.
            state = {**place, "state": phase.state_dict()}
            self.world.on_main(lambda: self.checkpoints.save(p.step, state))
        self._continue()
