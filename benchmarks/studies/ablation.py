"""The runs of a study: figures, intervals over seeds, paired differences, and distances from the frontier."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pecker_fast.figures import FORGOTTEN, Figure, figure
from pecker_fast.metrics.intervals import Interval, interval, paired
from pecker_fast.records import read_lines
from pecker_fast.report import RunRecord
from pecker_fast.report.files import images_to_forget

from .intervals import Frontier

TIME = "images_to_forget"
COST = "frechet_distance"
# The figures of a study, by key, in the order of its tables.
FIGURES = {
    row.key: row
    for row in (
        figure(TIME),
        figure("ua"),
        Figure(
            "ua_fluctuation", "UA range after forgetting", "UA moves by", "%", "{:.1f}", "lower",
            f"Highest minus lowest UA from the first evaluation at {FORGOTTEN:g} % on",
        ),
        figure("retain_accuracy"),
        figure(COST),
        figure("diversity"),
        figure("cover_frechet_distance"),
        figure("cover_diversity"),
        Figure(
            "drift", "Image drift", "image drift", "", "{:.3f}", "lower",
            "Root mean square change of the retained images against the run without forgetting",
        ),
        Figure(
            "parameter_change", "Parameter change", "moved", "%", "{:.2f}", None,
            "Distance of the generator's weights from their start, relative to their norm",
        ),
        figure("reached"),
        Figure(
            "mask_iou", "Overlap of masks", "overlap", "", "{:.2f}", None,
            "Intersection over union of successive masks, mean over the run",
        ),
        figure("seconds"),
    )
}  # fmt: skip
CURVES = ("ua", "retain_accuracy", COST, "cover_frechet_distance")


@dataclass(frozen=True)
class AblationRun:
    """A run of a study.

    Parameters
    ----------
    preset, pair, condition, factor : str
    seed : int
    images : int
        Seen in all.
    figures : dict
        Keys of FIGURES to values, None for figures that were not measured.
    curves : dict
        Keys of CURVES to [images seen, value] of each evaluation that measured them.
    """

    preset: str
    pair: str
    condition: str
    factor: str
    seed: int
    images: int
    figures: dict[str, float | None]
    curves: dict[str, list[list[float]]]

    @classmethod
    def read(
        cls, folder: Path, *, condition: str, factor: str, preset: str, pair: str, drift: float | None
    ) -> "AblationRun":
        """Reads the folder of a run. ValueError if the run has not ended."""
        run = RunRecord.read(folder)
        ious = [line["mask_iou"] for line in run.log if line.get("mask_iou") is not None]
        change = run.metrics.get("parameter_change")
        figures = {key: run.metrics.get(key) for key in FIGURES} | {
            TIME: images_to_forget(run.evaluations),
            "ua_fluctuation": fluctuation(run.evaluations),
            "drift": drift,
            "parameter_change": None if change is None else 100 * change,
            "reached": run.reached,
            "mask_iou": sum(ious) / len(ious) if ious else None,
        }
        curves = {
            key: [[line["images"], round(line[key], 4)] for line in run.evaluations if line.get(key) is not None]
            for key in CURVES
        }
        seed, images = run.metrics["seed"], run.metrics["images"]
        return cls(preset, pair, condition, factor, seed, images, figures, curves)


def fluctuation(evaluations: Sequence[Mapping[str, Any]], least: float = FORGOTTEN) -> float | None:
    """Highest minus lowest UA from the first evaluation at ``least`` percent on; None if none gets there."""
    values = [record["ua"] for record in evaluations if record.get("ua") is not None]
    first = next((i for i, value in enumerate(values) if value >= least), None)
    return None if first is None else max(values[first:]) - min(values[first:])


def read_ablation(path: Path) -> list[AblationRun]:
    """The runs of a runs.jsonl. ValueError if there is no such file, or a line is no run."""
    if not Path(path).is_file():
        raise ValueError(f"runs is {str(path)!r}, expected a file of runs, runs.jsonl of an earlier report")
    try:
        return [AblationRun(**line) for line in read_lines(Path(path))]
    except TypeError as error:
        raise ValueError(f"runs is {str(path)!r}, which is no runs of an ablation: {error}") from error


class Results:
    """Runs of one preset and pair of classes, by condition and seed.

    Parameters
    ----------
    runs : sequence of AblationRun
        All of that pair.
    default : str
        The condition that the others are compared with.
    frontier : sequence of str
        The conditions whose settings make the frontier.
    reference : str
        The condition without forgetting.
    """

    def __init__(self, runs: Sequence[AblationRun], default: str, frontier: Sequence[str], reference: str) -> None:
        self.by_condition: dict[str, dict[int, AblationRun]] = {}
        for run in runs:
            self.by_condition.setdefault(run.condition, {})[run.seed] = run
        self.default, self.reference = default, reference
        self.frontier = [name for name in frontier if name in self.by_condition]

    def values(self, condition: str, key: str) -> dict[int, float | None]:
        """Seed to figure."""
        return {seed: run.figures.get(key) for seed, run in self.by_condition.get(condition, {}).items()}

    def mean(self, condition: str, key: str) -> Interval | None:
        """Mean over the seeds. A run whose UA never stays at 98 % counts with its length: a lower bound."""
        if key != TIME:
            return interval([value for value in self.values(condition, key).values() if value is not None])
        runs = self.by_condition[condition].values()
        times = [run.images if run.figures[TIME] is None else run.figures[TIME] for run in runs]
        return interval(times, sum(run.figures[TIME] is None for run in runs))

    def against_default(self, condition: str, key: str) -> Interval | None:
        """The figure minus the default's on the same seed; None without runs of the default."""
        return paired(self.values(condition, key), self.values(self.default, key))

    def against_reference(self, condition: str, key: str = COST) -> Interval | None:
        """The figure minus that of the same seed's run without forgetting."""
        return paired(self.values(condition, key), self.values(self.reference, key))

    def excess_of_seeds(self, condition: str, key: str = COST) -> dict[int, float]:
        """Seed to the figure minus that of the same seed's frontier at the same time to UA 98.

        Seeds that never get there, or have no frontier, are left out. Below the frontier's shortest time its cost at
        that time counts, to the condition's disadvantage if the frontier rises towards short times.
        """
        excess = {}
        for seed, run in self.by_condition.get(condition, {}).items():
            others = self._frontier_runs(condition, seed)
            frontier = Frontier.of([(other.figures[TIME], other.figures.get(key)) for other in others])
            if frontier is not None and run.figures[TIME] is not None and run.figures.get(key) is not None:
                excess[seed] = run.figures[key] - frontier.cost(run.figures[TIME])
        return excess

    def _frontier_runs(self, condition: str, seed: int) -> list[AblationRun]:
        """The frontier's runs of a seed, but for those of ``condition`` itself."""
        runs = (self.by_condition[name].get(seed) for name in self.frontier if name != condition)
        return [run for run in runs if run is not None]

    def faster_than_frontier(self, condition: str) -> int:
        """The number of seeds on which UA 98 comes before every setting of the frontier."""
        count = 0
        for seed, run in self.by_condition.get(condition, {}).items():
            others = self._frontier_runs(condition, seed)
            times = [other.figures[TIME] for other in others if other.figures[TIME] is not None]
            count += run.figures[TIME] is not None and bool(times) and run.figures[TIME] < min(times)
        return count

    def row(self, condition: str) -> dict[str, Any]:
        """Everything about a condition, as JSON."""
        several = self.by_condition[condition]
        first = next(iter(several.values()))
        row: dict[str, Any] = {"condition": condition, "factor": first.factor, "seeds": sorted(several)}
        row["mean"] = {key: as_json(self.mean(condition, key)) for key in FIGURES}
        if condition != self.default:
            row["less_default"] = {key: as_json(self.against_default(condition, key)) for key in FIGURES}
        row[f"{COST}_less_reference"] = as_json(self.against_reference(condition))
        for key in (COST, "drift"):
            row[f"{key}_over_frontier"] = as_json(interval(list(self.excess_of_seeds(condition, key).values())))
        row["faster_than_frontier"] = self.faster_than_frontier(condition)
        return row


def as_json(value: Interval | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def pooled(several: Sequence[Results], condition: str, other: str, key: str) -> Interval | None:
    """Paired difference over all pairs of classes and seeds together."""
    mine = {(i, seed): v for i, of in enumerate(several) for seed, v in of.values(condition, key).items()}
    theirs = {(i, seed): v for i, of in enumerate(several) for seed, v in of.values(other, key).items()}
    return paired(mine, theirs)
