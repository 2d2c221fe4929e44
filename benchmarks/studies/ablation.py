"""The runs of a study: their figures, intervals over seeds, paired differences, and what lies off the frontier."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pecker_fast.files import read_lines
from pecker_fast.report import Run
from pecker_fast.report.across import FORGOTTEN, images_to_forget

from .intervals import Frontier, Interval, interval, paired

TIME = "images_to_forget"
COST = "frechet_distance"
# What a run is measured by: key, title, format, and what it says.
FIGURES = (
    (TIME, "images to UA 98", "{:.0f}", "images seen until UA stayed at 98 % or more; ≥ where some never did"),
    ("ua", "UA %", "{:.1f}", "unlearning accuracy at the end"),
    ("ua_fluctuation", "UA moves by", "{:.1f}", "largest less least UA in % from the first evaluation at 98 % on"),
    ("retain_accuracy", "retained %", "{:.1f}", "images asked for retained classes that the judge recognises"),
    (COST, "Fréchet", "{:.3f}", "distance from the real images of the retained classes"),
    ("diversity", "diversity", "{:.2f}", "within retained classes, over that of real images"),
    ("cover_frechet_distance", "cover Fréchet", "{:.1f}", "of what is drawn for the forgotten class from the cover's"),
    ("cover_diversity", "cover diversity", "{:.2f}", "of what is drawn for the forgotten class"),
    ("drift", "drift", "{:.3f}", "root mean square change of retained images against the run without forgetting"),
    ("parameter_change", "moved %", "{:.2f}", "length of the generator's way over that of its start"),
    ("reached", "reached %", "{:.0f}", "parameters that the forget gradient reached at some time"),
    ("mask_iou", "overlap", "{:.2f}", "of successive masks, intersection over union"),
    ("seconds", "seconds", "{:.0f}", "of training, on a machine that did other things meanwhile"),
)
CURVES = ("ua", "retain_accuracy", COST, "cover_frechet_distance")


@dataclass(frozen=True)
class AblationRun:
    """A run of a study.

    Parameters
    ----------
    preset, pair, condition, factor, seed: which one.
    images: seen in all.
    figures: keys of FIGURES to what was measured, None where nothing was.
    curves: key of CURVES to [images seen, value] of each evaluation that measured it.
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
        """From the folder of a run that has ended; ValueError where it has not."""
        run = Run.read(folder)
        ious = [line["mask_iou"] for line in run.log if line.get("mask_iou") is not None]
        moved = run.metrics.get("parameter_change")
        figures = {key: run.metrics.get(key) for key, *_ in FIGURES} | {
            TIME: images_to_forget(run.evaluations),
            "ua_fluctuation": fluctuation(run.evaluations),
            "drift": drift,
            "parameter_change": None if moved is None else 100 * moved,
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
    """Largest less least UA from the first evaluation that reaches ``least`` percent on; None where none does."""
    values = [record["ua"] for record in evaluations if record.get("ua") is not None]
    first = next((i for i, value in enumerate(values) if value >= least), None)
    return None if first is None else max(values[first:]) - min(values[first:])


def read_ablation(path: Path) -> list[AblationRun]:
    """The runs of a runs.jsonl. ValueError where there is no such file, or a line is of something else."""
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
    runs: of that pair.
    default: the condition that the others are compared with.
    frontier: conditions whose settings make the frontier.
    reference: the condition that nothing is forgotten in.
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
        """Over the seeds. Where UA never stayed at 98 %, the run's length stands for the time: a lower bound."""
        if key != TIME:
            return interval([value for value in self.values(condition, key).values() if value is not None])
        runs = self.by_condition[condition].values()
        times = [run.images if run.figures[TIME] is None else run.figures[TIME] for run in runs]
        return interval(times, sum(run.figures[TIME] is None for run in runs))

    def against_default(self, condition: str, key: str) -> Interval | None:
        """Of the figure less the default's on the same seed; None where the default is not there."""
        return paired(self.values(condition, key), self.values(self.default, key))

    def against_reference(self, condition: str, key: str = COST) -> Interval | None:
        """Of the figure less that of the same seed's run without forgetting."""
        return paired(self.values(condition, key), self.values(self.reference, key))

    def excess_of_seeds(self, condition: str, key: str = COST) -> dict[int, float]:
        """Seed to the figure less that of the same seed's frontier at the same time to UA 98.

        Seeds that never get there, or have no frontier, are left out. Below the frontier's least time its cost there
        counts, which is to the condition's disadvantage where the frontier rises towards short times.
        """
        found = {}
        for seed, run in self.by_condition.get(condition, {}).items():
            there = [self.by_condition[name].get(seed) for name in self.frontier if name != condition]
            frontier = Frontier.of([(other.figures[TIME], other.figures.get(key)) for other in there if other])
            if frontier is not None and run.figures[TIME] is not None and run.figures.get(key) is not None:
                found[seed] = run.figures[key] - frontier.cost(run.figures[TIME])
        return found

    def faster_than_frontier(self, condition: str) -> int:
        """On how many seeds UA 98 comes before every setting of the frontier."""
        count = 0
        for seed, run in self.by_condition.get(condition, {}).items():
            there = [self.by_condition[name].get(seed) for name in self.frontier if name != condition]
            times = [other.figures[TIME] for other in there if other and other.figures[TIME] is not None]
            count += run.figures[TIME] is not None and bool(times) and run.figures[TIME] < min(times)
        return count

    def row(self, condition: str) -> dict[str, Any]:
        """Everything that is said of a condition, as JSON."""
        several = self.by_condition[condition]
        first = next(iter(several.values()))
        found: dict[str, Any] = {"condition": condition, "factor": first.factor, "seeds": sorted(several)}
        found["mean"] = {key: as_json(self.mean(condition, key)) for key, *_ in FIGURES}
        if condition != self.default:
            found["less_default"] = {key: as_json(self.against_default(condition, key)) for key, *_ in FIGURES}
        found[f"{COST}_less_reference"] = as_json(self.against_reference(condition))
        for key in (COST, "drift"):
            found[f"{key}_over_frontier"] = as_json(interval(list(self.excess_of_seeds(condition, key).values())))
        found["faster_than_frontier"] = self.faster_than_frontier(condition)
        return found


def as_json(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def pooled(several: Sequence[Results], condition: str, other: str, key: str) -> Interval | None:
    """Paired difference over all pairs of classes and seeds together."""
    mine = {(i, seed): v for i, of in enumerate(several) for seed, v in of.values(condition, key).items()}
    theirs = {(i, seed): v for i, of in enumerate(several) for seed, v in of.values(other, key).items()}
    return paired(mine, theirs)
