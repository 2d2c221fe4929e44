"""Does forgetting go deeper if entries of the generator are destroyed first? Kinds, shares and strengths, over seeds.

``python -m pecker_fast.benchmarks.studies.destroy --workers 1`` makes all missing runs, the most valuable first;
``--summary`` only summarises the finished runs. A run trains a generator as the study of patches does, measures it, and
attacks it: its figures are the steps after which half of the samples of each attack are of the class again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pecker_fast.files import read_lines
from pecker_fast.metrics.intervals import Interval, interval
from pecker_fast.report.blocks import Section, Text, figures_table
from pecker_fast.report.render import write_document
from pecker_fast.robustness.cost import steps_to_half

from .patch import SharedArguments, call, make, missing
from .patch_conditions import NEVER_SAW, PATCH, RELABEL, SEEDS, Condition, Job, Place

PROGRAM = "python -m pecker_fast.benchmarks.studies.destroy"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "destroy"
PLACES: tuple[Place, ...] = (("digits", (0, 1)), ("digits", (3, 8)), ("digits", (7, 1)), ("mnist", (0, 1)))
# Steps after which each attack is measured. The last ones are the ends: a generator that resists longer is censored.
STEPS = {
    "inversion": (25, 50, 75, 100, 150, 200, 300),
    "regression": (2, 4, 6, 8, 10, 15, 20, 30),
    "matching": (2, 4, 6, 8, 10, 15, 20, 30),
    "denoising": (2, 4, 6, 8, 10, 15, 20, 30, 50),
}
# The two ways to forget that something is destroyed for: the patch, and the dense rule that was best in the trials of
# the study of patches.
DENSE = ("pecker+", {"generator_forget_weight": 0.3, "score_forget_weight": 0.02, "generator_learning_rate": 1.5e-4})
KINDS, STRENGTHS = ("noise", "shrink", "reset"), (0.5, 1.0)
PATCH_SHARES, DENSE_SHARES = (0.1, 0.05), (0.1, 0.5)


def _conditions() -> Iterator[Condition]:
    """Controls first, then the grid with its own controls."""
    yield Condition(RELABEL, RELABEL, group="control")
    yield Condition(PATCH, "patch", {"density": 0.1}, "patch")
    yield Condition("dense", DENSE[0], dict(DENSE[1]), "dense")
    yield Condition(NEVER_SAW, NEVER_SAW, group="control")
    for strength in reversed(STRENGTHS):
        for base, method, own, shares in (
            ("patch", "patch", {"density": 0.1}, PATCH_SHARES),
            ("dense", *DENSE, DENSE_SHARES),
        ):
            for share in shares:
                for kind in KINDS:
                    options = {**own, "destroy": kind, "destroy_share": share, "destroy_strength": strength}
                    yield Condition(f"{base}, {kind} {share:g} x {strength:g}", method, options, base)
                # The controls are not confined to the mask of a patch.
                control = {"destroy": "noise", "destroy_strength": strength, "destroy_within": "all"}
                control = {**own, **control, "destroy_share": share}
                for label, how in (("random", {"destroy_score": "random"}), ("dense", {"destroy_dense": True})):
                    yield Condition(f"{base}, {label} noise {share:g} x {strength:g}", method, {**control, **how}, base)


CONDITIONS = tuple(_conditions())


@dataclass(frozen=True)
class DestroyArguments(SharedArguments):
    """Options of the study."""

    results: str = str(RESULTS)
    """Folder of the records, a line each run."""


def plan(seeds: Sequence[int] = SEEDS, places: Sequence[Place] = PLACES) -> Iterator[Job]:
    """All runs: the first place with all seeds, then the next one; a seed's conditions stay together."""
    for preset, pair in places:
        for seed in seeds:
            for condition in CONDITIONS:
                yield Job(preset, pair, condition, seed)


def destroy_job(job: Job, cache: str) -> dict[str, Any]:
    """Train a generator, measure it and attack it; returns the record as JSON."""
    from .ablate import SparseEvaluation, evaluator_of
    from .patch_conditions import REFERENCE
    from .patch_relearn import attacked, network_of
    from .patch_runs import SAMPLES_PER_CLASS, method_of

    folder = Path(cache)
    network = network_of(job, folder)
    # How it is drawn does not depend on what has been destroyed.
    method = method_of(Job(job.preset, job.pair, REFERENCE, job.seed), folder)
    evaluator = evaluator_of(job.preset, network.config["sample_size"], job.pair[:1], job.pair[1])
    measured, _ = SparseEvaluation(method.setting, method, evaluator, SAMPLES_PER_CLASS).full(network)
    curves = attacked(network, job, folder, STEPS)
    preset, pair, name, seed = job.key
    names = ("ua", "retain_accuracy", "frechet_distance", "cover_frechet_distance")
    figures = {key: measured[key] for key in names}
    steps = {attack: steps_to_half(*zip(*sorted(curve.items()), strict=True)) for attack, curve in curves.items()}
    line = ", ".join(f"{attack} {'never' if n is None else f'{n:.0f}'}" for attack, n in steps.items())
    return {
        "preset": preset,
        "pair": pair,
        "condition": name,
        "seed": seed,
        "method": job.condition.method,
        "options": job.condition.options,
        "figures": figures,
        "steps": steps,
        "ua": curves,
        "line": f"UA {figures['ua']:.0f}, retained Fréchet {figures['frechet_distance']:.2f}, back after: {line}",
    }


def _steps(records: Sequence[Mapping[str, Any]], attack: str) -> Interval | None:
    """Mean over the seeds. A generator that resists to the end counts with the last number of steps: a lower bound."""
    values = [record["steps"][attack] for record in records]
    end = max(int(step) for record in records for step in record["ua"][attack])
    return interval([end if value is None else value for value in values], sum(value is None for value in values))


def _table(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    attacks = list(records[0]["steps"])
    rows = [["condition", "seeds", "UA, %", "retained accuracy, %", "retained Fréchet", "cover Fréchet", *attacks]]
    rows[0].append("by the strongest, of relabel")
    by_name: dict[str, list[Mapping[str, Any]]] = {condition.name: [] for condition in CONDITIONS}
    for record in records:
        by_name[record["condition"]].append(record)
    yardstick = {record["seed"]: record["steps"] for record in by_name[RELABEL]}
    for name, several in by_name.items():
        if not several:
            continue
        cells = []
        for key, text in (("ua", "{:.0f}"), ("retain_accuracy", "{:.1f}"), ("frechet_distance", "{:.2f}")):
            cells.append(interval([record["figures"][key] for record in several]).text(text.format))
        cover = interval([record["figures"]["cover_frechet_distance"] for record in several])
        cells.append(cover.text("{:.0f}".format))
        cells += [_steps(several, attack).text("{:.0f}".format) for attack in attacks]
        pairs = [(record, yardstick[record["seed"]]) for record in several if record["seed"] in yardstick]
        ratios = [_weakest(record, steps) for record, steps in pairs]
        relative = interval([ratio for ratio in ratios if ratio is not None])
        rows.append([name, str(len(several)), *cells, "-" if relative is None else relative.text("{:.2f}".format)])
    return rows


def _weakest(record: Mapping[str, Any], yardstick: Mapping[str, float | None]) -> float | None:
    """The least quotient of the record's steps and the yardstick's over the attacks that undo both; a generator that
    resists to an attack's end is left out of it, since its quotient is unknown."""
    quotients = [
        steps / yardstick[attack] for attack, steps in record["steps"].items() if steps and yardstick.get(attack)
    ]
    return min(quotients, default=None)


def write_summary(folder: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write report.md and report.html, and return the path of report.md. ValueError if there is nothing to report."""
    if not records:
        raise ValueError(f"results is {str(folder)!r}, which has no runs of this study")
    notes = (
        "Means over the seeds with 95 % t intervals. The columns of the attacks are the steps after which half of the "
        "samples are of the class again; ≥ marks a mean to which some seed that resisted to the end contributes the "
        "last number of steps.",
        "The last column is the least quotient of an attack's steps and those that it needs against relabel, paired by "
        "seed.",
    )
    sections = [Section("How to read it", [*map(Text, notes)])]
    by_place: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        by_place.setdefault((record["preset"], record["pair"]), []).append(record)
    for (preset, pair), several in by_place.items():
        title = f"{preset}, {pair.replace('-', ' forgotten, with cover ')}"
        sections.append(Section(title, [figures_table(_table(several))]))
    return write_document(folder, "Destroying before forgetting", sections)


def study(args: DestroyArguments) -> None:
    """Make the missing runs, append a line for each, and write the summary."""
    results = Path(args.results)

    def records() -> list[dict[str, Any]]:
        return [record for path in sorted(results.glob("*.jsonl")) for record in read_lines(path)]

    def path_of(job: Job) -> Path:
        return results / f"{job.key[0]}-{job.key[1]}.jsonl"

    if make(args, lambda: missing(args, PLACES, plan, CONDITIONS, records()), destroy_job, path_of):
        report = write_summary(results, records())
        if args.summary:
            print(report.read_text())
        print(f"report: {report}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Wrong input ends with one line on stderr and exit status 2."""
    call(DestroyArguments, study, PROGRAM, arguments)


if __name__ == "__main__":
    main()
