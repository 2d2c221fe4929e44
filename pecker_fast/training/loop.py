"""The loop: runs phases one after the other, logs, evaluates, checkpoints, and stops when it is told to."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..files import append_line, read_lines, write_text
from ..parallel import World
from ..profiling import Profiler
from ..unlearning import Phase
from .checkpoints import CheckpointError, Checkpoints


class NonFiniteError(RuntimeError):
    """A loss or a weight became inf or NaN."""


@dataclass(frozen=True)
class LoopOptions:
    """How a run is kept."""

    logging_steps: int = 10
    """Steps between lines of train.jsonl."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; one more is written at the end."""
    checkpoints_total_limit: int | None = None
    """How many checkpoints to keep; all by default."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint: "latest", "checkpoint-100" or a path."""
    validation_steps: int = 500
    """Steps between evaluations."""
    stop_at_nonfinite: bool = True
    """End the run when a loss is inf or NaN; the last good checkpoint is kept."""

    def check(self) -> None:
        """Raises ValueError, naming the option, where one is out of range."""
        for name in ("logging_steps", "checkpointing_steps", "validation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass
class Progress:
    """Where a run is. ``iteration`` counts within the phase, ``step`` over all; ``seconds`` of training alone."""

    phase: int = 0
    iteration: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    stopped_by: int | None = None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of SIGTERM and Ctrl-C that came within: the run is to end after an iteration. A second Ctrl-C ends it
    at once."""
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
                # Only the main thread may: elsewhere whoever owns it decides.
                break
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Loop:
    """Runs phases in ``folder``.

    Parameters
    ----------
    phases: in order.
    folder: of the run: train.jsonl, evaluation.jsonl and checkpoints/ go there.
    options: how the run is kept.
    fingerprint: JSON that says which run this is; checkpoints of others are refused.
    evaluate: from a phase's averaged network and the step to what goes into evaluation.jsonl, or None. The main
        process's is called; the others need none.
    export: writes a phase's averaged network into a checkpoint's folder. The main process's is called; all have one, or
        none has.
    on_log: called with every line of train.jsonl and evaluation.jsonl.
    show_progress: whether there is a progress bar.
    world: the processes of the run; the main one writes, evaluates and shows progress.
    profiler: what measures the iterations, or None.
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
        show_progress: bool = True,
        world: World | None = None,
        profiler: Profiler | None = None,
    ) -> None:
        options.check()
        self.world, self.profiler = world or World(), profiler
        self.phases, self.folder, self.options = list(phases), Path(folder), options
        self.checkpoints = Checkpoints(self.folder / "checkpoints", options.checkpoints_total_limit, fingerprint)
        self.evaluate, self.export, self.on_log = evaluate, export, on_log
        self.show_progress = show_progress and self.world.is_main
        self.total = sum(phase.iterations for phase in self.phases)
        self.progress = Progress()
        self._window: dict[str, Tensor] = {}
        self._window_steps = 0
        self._since = 0.0
        self._prepared = False

    def run(self) -> Progress:
        """Runs to the end, or until a signal; then a checkpoint has been written and ``stopped_by`` is set.

        Raises NonFiniteError, and CheckpointError for a checkpoint that cannot be resumed.
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
                self._go_on()
                while p.iteration < phase.iterations and p.stopped_by is None:
                    self._iterate(phase, caught)
                    bar.update()
                if p.stopped_by is not None:
                    break
            self._pause()
            self._checkpoint(self.phases[p.phase])
        if self.profiler is not None:
            self.profiler.pause()
            self.profiler.close()
        return p

    def prepare(self) -> None:
        """Loads the checkpoint to go on from, or empties the logs. ``run`` does it where it has not been done.

        Raises CheckpointError before anything is changed.
        """
        if self._prepared:
            return
        p, which = self.progress, self.options.resume_from_checkpoint
        logs = [self.folder / "train.jsonl", self.folder / "evaluation.jsonl"]
        if which is not None:
            step, state = self.checkpoints.load(which)
            p.phase, p.iteration, p.step = state["phase"], state["iteration"], step
            p.images, p.seconds = state["images"], state["seconds"]
            if not p.phase < len(self.phases):
                raise CheckpointError(f"checkpoint-{step} is in phase {p.phase}, this run has {len(self.phases)}")
            self.phases[p.phase].load_state_dict(state["state"])

        def trim() -> None:
            # What came after the checkpoint will come again.
            for path in logs:
                kept = [] if which is None else [line for line in read_lines(path) if line["step"] <= p.step]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

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
        # All processes stop after the same iteration, whichever got the signal.
        p.stopped_by = self.world.largest(caught[0] if caught else 0) or None
        last = p.iteration == phase.iterations or p.stopped_by is not None
        if p.step % o.logging_steps == 0 or last:
            self._log(phase)
        if not phase.is_preparation and (p.step % o.validation_steps == 0 or p.iteration == phase.iterations):
            self._evaluate_now(phase)
        if p.step % o.checkpointing_steps == 0:
            self._checkpoint(phase)

    def _pause(self) -> None:
        """Adds the time since the last pause to the training time. Waits for the device."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.progress.seconds += now - self._since
        self._since = now
        if self.profiler is not None:
            self.profiler.pause()

    def _go_on(self) -> None:
        """Training goes on after a pause."""
        self._since = time.perf_counter()
        if self.profiler is not None:
            self.profiler.resume()

    def _outside(self, name: str) -> AbstractContextManager:
        return nullcontext() if self.profiler is None else self.profiler.outside(name)

    def _means(self) -> dict[str, float]:
        """Mean losses since the last line of the log. Waits for the device. Raises NonFiniteError where the run is to
        stop."""
        if not self._window:
            return {}
        window = torch.stack([loss.float() for loss in self._window.values()]) / self._window_steps
        self.world.average_([window])
        means = dict(zip(self._window, window.tolist(), strict=True))
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad and self.options.stop_at_nonfinite:
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
        self._write("train.jsonl", {**place, "seconds": p.seconds, **losses, **phase.describe(), **profile})
        self._go_on()

    def _evaluate_now(self, phase: Phase) -> None:
        p = self.progress
        self._means()
        self._pause()

        def measure(network: nn.Module) -> None:
            found = self.evaluate(network, p.step)
            if found is not None:
                self._write("evaluation.jsonl", {"step": p.step, "images": p.images, "seconds": p.seconds, **found})

        # What evaluates is perhaps the main process's alone.
        if self.world.largest(int(self.evaluate is not None)):
            with self._outside("evaluation"), phase.averaged() as network:
                self.world.on_main(lambda: measure(network))
        self._go_on()

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        append_line(self.folder / name, record)
        if self.on_log is not None:
            self.on_log(record)

    def _checkpoint(self, phase: Phase) -> None:
        p = self.progress
        if self.options.stop_at_nonfinite:
            self._means()
            # Each process may have a part of the weights: all of them stop.
            if self.world.largest(int(not phase.is_finite())):
                raise NonFiniteError(f"a weight became inf or NaN by step {p.step}{self._last_good()}")
        self._pause()
        place = {"phase": p.phase, "iteration": p.iteration, "images": p.images, "seconds": p.seconds}
        with self._outside("checkpoints"):
            if self.export is not None:
                with phase.averaged() as network:
                    export = partial(self.export, network)
                    self.world.on_main(lambda: self.checkpoints.stage(p.step, export))
            # Once the averaged weights are not in the place of the others any more.
            state = {**place, "state": phase.state_dict()}
            self.world.on_main(lambda: self.checkpoints.save(p.step, state))
        self._go_on()
