"""Several methods over several seeds on one preset: the steps that all tasks share."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..report import RunRecord
from .arguments import UnlearnArguments
from .folder import run_config
from .presets import preset
from .reports import earlier_runs
from .run import Run
from .several import assignment, check_alone, check_place, check_shared, ended, resumed, run_arguments
from .unlearn import unlearn

Plan = dict[str, list[UnlearnArguments]]


@dataclass(frozen=True, kw_only=True)
class CompareArguments(ABC):
    """Options of a comparison. ``ClassComparison`` and ``PromptComparison`` add their own, measure and report."""

    preset: str
    """Name of the preset."""
    methods: tuple[str, ...]
    """Names of methods, separated by spaces or commas."""
    seeds: int = 3
    """Number of seeds that each method is run on."""
    first_seed: int = 0
    """The first of them."""
    output_dir: str | None = None
    """Folder of the comparison. Default: runs/compare-<preset>."""
    pretrained_model_name_or_path: str | None = None
    """The network to start from. Default: the preset's."""
    max_train_steps: int | None = None
    """Iterations of each method. Default: the method's."""
    set: tuple[str, ...] = ()
    """Options for all methods that have them, as name=value, such as generator_learning_rate=1e-4."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of runs that have ended."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: a GPU if there is one."""
    progress_bar: bool = True
    """Show a progress bar."""

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        return Path(self.output_dir or f"runs/compare-{self.preset}")

    @property
    def names(self) -> list[str]:
        """The names of ``methods``. ValueError if there is none, or one twice."""
        names = [name for item in self.methods for name in item.split(",") if name]
        if not names or len({*names}) < len(names):
            raise ValueError(f"methods is {', '.join(names) or 'empty'}, expected each method once")
        return names

    def folder_of(self, name: str, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / f"{name}-seed{seed}"

    def check_earlier(self, seeds: Mapping[str, Sequence[int | None]]) -> None:
        """Check that the report of an earlier comparison in the folder would not lose a run.

        Parameters
        ----------
        seeds : Mapping
            The seeds of each method in the new report.

        Raises
        ------
        ValueError
            If the earlier one has a method or a seed that the new one would not have.
        """
        earlier = earlier_runs(self.folder)
        lost = [name for name, several in earlier.items() if not {*several} <= {*seeds.get(name, ())}]
        if lost:
            every = ", ".join(dict.fromkeys([*earlier, *seeds]))
            raise ValueError(
                f"output_dir {self.folder} has the report of a comparison with {', '.join(lost)}, of which this one "
                f"lacks runs: compare all of {every} with as many seeds (runs that have ended are read, not repeated), "
                "or choose another output_dir"
            )

    def report_again(self) -> "Comparison | None":
        """Report an earlier comparison instead, if the options ask for it; nothing is run."""
        return None

    @abstractmethod
    def trains(self, name: str) -> bool:
        """Whether the row ``name`` trains a network. ValueError if there is no such row."""

    @abstractmethod
    def options(self, name: str) -> dict[str, Any]:
        """The options of a row's runs that are not the method's, by name."""

    @abstractmethod
    def check(self, plan: Plan) -> None:
        """Check the options of all runs before the first one starts. ValueError or TypeError if one is wrong."""

    @abstractmethod
    def measure(self, name: str, folder: Path, args: UnlearnArguments | None) -> None:
        """Measure a run that has ended, or a row that trains nothing, unless it has been measured in the same way."""

    @abstractmethod
    def report(self, runs: Mapping[str, Sequence[RunRecord]], plan: Plan) -> tuple[Path, str]:
        """Write the report; return its path and the table for a terminal."""


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Parameters
    ----------
    runs : dict
        Method to its runs, one for each seed.
    table : str
        Means and spreads, to read.
    report : Path
        report.md, with curves and the figures of each run.
    """

    runs: dict[str, list[Run]]
    table: str
    report: Path

    def __str__(self) -> str:
        return self.table


def compare(args: CompareArguments) -> Comparison:
    """Run methods over seeds, measure them, and write a report with means and spreads.

    Called again with the same options it continues where it was interrupted: runs that have ended are read, not
    repeated.

    Parameters
    ----------
    args : CompareArguments
        ``ClassComparison`` or ``PromptComparison``.

    Returns
    -------
    Comparison
        The runs, a table and the report.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before the first run starts.
    SystemExit
        With status 128 + n if signal n stopped a run, after a checkpoint.
    """
    check_alone("compare")
    earlier = args.report_again()
    if earlier is not None:
        return earlier
    check_place("compare", args.folder)
    names = args.names
    if args.seeds < 1:
        raise ValueError(f"seeds is {args.seeds}, expected at least 1")
    plan, folders = _plan(args, names)
    args.check(plan)
    args.check_earlier({name: [run.compute.seed for run in plan.get(name, ())] or [None] for name in names})
    for run in (run for runs in plan.values() for run in runs):
        ended(run)
    try:
        _run(args, plan, folders)
    except SystemExit:
        print("run the same command again to continue")
        raise
    report, table = args.report({name: [RunRecord.read(folder) for folder in folders[name]] for name in names}, plan)
    return Comparison({name: runs_in(folders[name]) for name in plan}, table, report)


def runs_in(folders: Sequence[Path]) -> list[Run]:
    """The runs of unlearning in these folders."""
    return [Run(folder) for folder in folders if run_config(folder)]


def _plan(args: CompareArguments, names: Sequence[str]) -> tuple[Plan, dict[str, list[Path]]]:
    """The runs of each row that trains, and the folders of every row: one a seed, or just one."""
    shared = dict(assignment(item) for item in args.set)
    if args.max_train_steps is not None:
        shared["max_train_steps"] = args.max_train_steps
    common = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "device": args.device,
        "progress_bar": args.progress_bar,
    }
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    plan: Plan = {}
    folders: dict[str, list[Path]] = {}
    for name in names:
        if args.trains(name):
            folders[name] = [args.folder_of(name, seed) for seed in seeds]
            options = {**common, **args.options(name)}
            plan[name] = [
                run_arguments(args.preset, name, seed, folder, options, shared)
                for seed, folder in zip(seeds, folders[name], strict=True)
            ]
        else:
            folders[name] = [args.folder / name]
    check_shared(shared, [runs[0] for runs in plan.values()], names)
    return plan, folders


def _run(args: CompareArguments, plan: Plan, folders: Mapping[str, Sequence[Path]]) -> None:
    """Train what has not ended and measure it, seed by seed, so that an interruption leaves whole comparisons."""
    total, done = sum(len(runs) for runs in plan.values()), 0
    for i in range(args.seeds):
        before: Tensor | None = None
        for name, several in folders.items():
            if i >= len(several):
                continue
            run = plan[name][i] if name in plan else None
            done += run is not None
            if run is not None and not ended(run):
                print(f"[{done} of {total}] {name}, seed {run.compute.seed}")
                before = unlearn(resumed(run), before).before
                if not args.keep_checkpoints:
                    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            args.measure(name, several[i], run)


def comparison_class(preset_name: str) -> Callable[[], CompareArguments]:
    """The kind of comparison on a preset. ValueError if there is no such preset."""
    # Imported only if needed: each brings libraries that take a while.
    if preset(preset_name).task == "prompts":
        from .prompts.comparison import PromptComparison

        return PromptComparison
    from .classes.comparison import ClassComparison

    return ClassComparison


def fields_of(args: CompareArguments, names: Sequence[str]) -> dict[str, Any]:
    """The options ``names`` of a comparison that are set."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
