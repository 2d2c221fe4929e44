"""Comparing methods that forget classes: figures, robustness, and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ...hashing import file_sha256, weights_hash
from ...metrics import check_inception_weights
from ...models import resolve
from ...report import RunRecord, read_across, text_table, write_across
from ...run_records import read_metrics
from ...unlearning import method_class
from ..arguments import UnlearnArguments, check_unused
from ..compare import CompareArguments, Comparison, Plan, fields_of, runs_in
from ..distilled import existing_distilled
from ..evaluate import evaluate
from ..presets import class_preset
from ..robustness import RobustnessArguments, robustness
from ..robustness_across import write_across_runs
from ..several import command_line
from ..task import unlearn_arguments
from .evaluation import ClassEvaluation
from .names import cover_of, named
from .task import ClassTask

RELABEL = "relabel"
# Options of the comparison that its runs take, under the same names.
OF_RUNS = ("forget_classes", "cover_class", "samples_per_class", "judge", "dataset_name", "data_root")


@dataclass(frozen=True, kw_only=True)
class ClassComparison(CompareArguments):
    """Options of a comparison of methods that forget classes."""

    preset: str = "digits"
    """digits, digits16, mnist, images, cifar10 or stl10."""
    methods: tuple[str, ...] = ("pecker", "pecker+", "sfd", "relabel")
    """Names of methods, separated by spaces or commas: pecker, pecker+, patch, sfd, retrain, salun,
    selective_amnesia, esd, and relabel, the yardstick without training."""
    forget_classes: tuple[str, ...] | None = None
    """Classes to forget, by number or name. Default: the preset's."""
    cover_class: str | None = None
    """Class to draw in their place, by number or name, or "random". Default: the preset's."""
    distilled: str | None = None
    """Distilled networks that the methods with a one-step generator start from: the folder of a run of pecker-fast
    distil, or auto. Default: auto for methods that need them; for relabel those that have been made already; otherwise
    none."""
    samples_per_class: int | None = None
    """Images of each class in an evaluation. Default: the preset's."""
    judge: str | None = None
    """File of the classifier that evaluates. Default: the preset's."""
    inception_weights: str | None = None
    """File of Inception's weights: each run is then also measured by FID, sFID, IS, KID, precision and recall, as
    pecker-fast evaluate does."""
    final_samples_per_class: int | None = None
    """Images of each class for these figures. Default: as published."""
    dataset_name: str | None = None
    """digits, mnist, cifar10, stl10 or folder:<path>. Default: the preset's."""
    data_root: str | None = None
    """Folder with the files of cifar10 or stl10."""
    robustness: bool = False
    """Attack every run (pecker-fast robustness), and report the result, with the cost of relearning over the seeds in
    robustness.md."""
    seconds: bool = True
    """Report seconds. Leave them out if the machine was also doing other things."""
    runs: str | None = None
    """Only report the runs of this file, compare.json of an earlier comparison, into output_dir."""

    def trains(self, name: str) -> bool:
        return True

    def options(self, name: str) -> dict[str, Any]:
        one_step = "t_init" in {item.name for item in fields(method_class(name).Options)}
        options = fields_of(self, [*OF_RUNS, *(["distilled"] if one_step else [])])
        if name == RELABEL and self.distilled is None:
            options["distilled"] = self._relabelled
        return options

    @cached_property
    def _relabelled(self) -> str | None:
        """The distilled networks that are relabelled, so that it draws in one step like most others."""
        path = self.pretrained_model_name_or_path
        network = resolve(path, shipped=class_preset(self.preset).network).network
        args = unlearn_arguments(self.preset, RELABEL, {"pretrained_model_name_or_path": path})
        return existing_distilled(args, weights_hash(network))

    def check(self, plan: Plan) -> None:
        if self.inception_weights is not None:
            check_inception_weights(self.inception_weights)
        elif self.final_samples_per_class is not None:
            raise ValueError("final_samples_per_class is given, but not inception_weights, which it is for")
        for runs in plan.values():
            ClassTask.check(runs[0])

    def measure(self, name: str, folder: Path, args: UnlearnArguments | None) -> None:
        if self.inception_weights is not None:
            self._measure_with_inception(folder, args)
        if self.robustness and not (folder / "robustness.json").is_file():
            print(f"robustness: {name}, seed {args.compute.seed}")
            robustness(RobustnessArguments(run=(str(folder),), progress_bar=self.progress_bar))

    def _measure_with_inception(self, folder: Path, args: UnlearnArguments) -> None:
        values = class_preset(self.preset)
        count = self.final_samples_per_class or values.final_samples_per_class or args.request.samples_per_class
        if is_measured(folder, file_sha256(self.inception_weights), count):
            return
        print(f"measured with Inception: {folder}")
        evaluate(
            ClassEvaluation(
                run=str(folder),
                samples_per_class=count,
                inception_weights=self.inception_weights,
                device=self.device,
                # The features of the real images serve all runs.
                features_dir=str(self.folder / "features"),
                progress_bar=self.progress_bar,
            )
        )

    def report(self, runs: Mapping[str, Sequence[RunRecord]], plan: Plan) -> tuple[Path, str]:
        request = ClassTask.settled(next(iter(plan.values()))[0]).request
        names, cover_class = request.class_names, cover_of(request.cover_class)
        cover = "a retained class drawn at random" if cover_class is None else f"class {named(cover_class, names)}"
        classes = ", ".join(named(label, names) for label in request.forget_classes)
        facts = {name: _facts(plan[name][0], runs[name][0]) for name in runs}
        request_line = f"Preset {self.preset}: forget class {classes}, with {cover} as cover."
        command = command_line("compare")
        report = write_across(self.folder, runs, seconds=self.seconds, asked=request_line, command=command, facts=facts)
        folders = [run.folder for several in runs.values() for run in several]
        # Attacks of an earlier version have no costs.
        if self.robustness and any("cost" in run.json("robustness") for several in runs.values() for run in several):
            write_across_runs(self.folder, folders)
        return report, text_table(runs, self.seconds)

    def report_again(self) -> Comparison | None:
        if self.runs is None:
            return None
        records, facts = read_across(Path(self.runs))
        if self.output_dir is None:
            raise ValueError(
                f"output_dir is not given: expected the folder for the report of runs {self.runs} (pecker-fast report "
                f"{Path(self.runs).parent} writes the report of that comparison again)"
            )
        used = ("runs", "output_dir", "seconds", "progress_bar")
        unused = [item.name for item in fields(self) if item.name not in used]
        check_unused(type(self), vars(self), unused, f"runs {self.runs} are only reported")
        folder = Path(self.output_dir)
        self.check_earlier({name: [run.metrics.get("seed") for run in several] for name, several in records.items()})
        folder.mkdir(parents=True, exist_ok=True)
        report = write_across(folder, records, seconds=self.seconds, **facts)
        runs = {name: runs_in([record.folder for record in several]) for name, several in records.items()}
        return Comparison(runs, text_table(records, self.seconds), report)


def _facts(args: UnlearnArguments, run: RunRecord) -> dict[str, str]:
    """What the table says of a method in words."""
    needs_data = method_class(args.method).needs_data(args.options)
    sampler = str(run.metrics.get("sampler", "-")).replace("_", " ")
    return {"data-free": "no" if needs_data else "yes", "sampler": sampler}


def is_measured(folder: Path, weights_sha256: str, samples_per_class: int) -> bool:
    """Whether a run has been measured with these weights of Inception on so many images of each class."""
    protocol = read_metrics(folder).get("protocol", {}).get("evaluation", {})
    return (
        protocol.get("image_quality", {}).get("weights_sha256") == weights_sha256
        and protocol["samples"]["samples_per_class"] == samples_per_class
    )
