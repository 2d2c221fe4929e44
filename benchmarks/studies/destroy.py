"""Does forgetting go deeper if entries of the generator are destroyed first, or its classes relabelled afterwards?

``python -m pecker_fast.benchmarks.studies.destroy --workers 1`` makes all missing runs, the most valuable first;
``--summary`` only summarises the finished runs. A run trains a generator as the study of patches does, measures it, and
attacks it: its figures are the steps after which half of the samples of each attack are of the class again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pecker_fast.metrics.intervals import Interval, interval
from pecker_fast.records import read_lines
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
    "inversion_random": (5, 10, 15, 25, 50, 75, 100, 150, 200),
    "regression": (2, 4, 6, 8, 10, 15, 20, 30),
    "matching": (2, 4, 6, 8, 10, 15, 20, 30),
    "denoising": (2, 4, 6, 8, 10, 15, 20, 30, 50),
}
# The two ways to forget that something is destroyed for: the patch, and the dense rule that was best in the trials of
# the study of patches.
DENSE = ("pecker+", {"generator_forget_weight": 0.3, "score_forget_weight": 0.02, "generator_learning_rate": 1.5e-4})
KINDS, STRENGTHS = ("noise", "shrink", "reset"), (0.5, 1.0)
PATCH_SHARES, DENSE_SHARES = (0.1, 0.05), (0.1, 0.5)


def _destroying(base: str, kind: str, share: float, strength: float, **further: Any) -> Condition:
    """A way to forget after entries have been destroyed; ``base`` is "patch" or "dense"."""
    method, own = ("patch", {"density": 0.1}) if base == "patch" else DENSE
    options = {**own, "destroy": kind, "destroy_share": share, "destroy_strength": strength, **further}
    label = "dense noise" if further.get("destroy_dense") else kind
    label = "random noise" if further.get("destroy_score") == "random" else label
    name = f"{base}, {label} {share:g} x {strength:g}" + (", relabelled" if further.get("relabel") else "")
    name += f", {further['max_train_steps']} iterations" if "max_train_steps" in further else ""
    return Condition(name, method, options, base)


def _grid() -> Iterator[Condition]:
    for strength in reversed(STRENGTHS):
        for base, shares in (("patch", PATCH_SHARES), ("dense", DENSE_SHARES)):
            for share in shares:
                for kind in KINDS:
                    yield _destroying(base, kind, share, strength)
                # The controls are not confined to the mask of a patch.
                for how in ({"destroy_score": "random"}, {"destroy_dense": True}):
                    yield _destroying(base, "noise", share, strength, destroy_within="all", **how)


# Controls, the ways to forget with the options that go deeper, and the controls of destroying.
CORE = (
    Condition(RELABEL, RELABEL, group="control"),
    Condition(PATCH, "patch", {"density": 0.1}, "patch"),
    Condition("patch, relabelled", "patch", {"density": 0.1, "relabel": True}, "patch"),
    Condition("dense", DENSE[0], dict(DENSE[1]), "dense"),
    Condition("dense, relabelled", DENSE[0], {**DENSE[1], "relabel": True}, "dense"),
    Condition(NEVER_SAW, NEVER_SAW, group="control"),
    Condition("body, relabelled", "patch", {"density": 0.1, "act_on": ("body",), "relabel": True}, "patch"),
    _destroying("patch", "noise", 0.05, 1.0),
    _destroying("patch", "noise", 0.05, 1.0, relabel=True),
    _destroying("dense", "noise", 0.1, 1.0, relabel=True),
    _destroying("patch", "noise", 0.05, 1.0, destroy_within="all", destroy_score="random"),
    _destroying("patch", "noise", 0.05, 1.0, destroy_within="all", destroy_dense=True),
)
# Destroyed entries have to be taught again: three times the iterations, which the control has too.
LONGER = {"relabel": True, "max_train_steps": 240}
DEEPER = (
    _destroying("patch", "shrink", 0.1, 1.0, relabel=True),
    _destroying("patch", "shrink", 0.1, 1.0, **LONGER),
    _destroying("patch", "shrink", 0.05, 1.0, **LONGER),
    _destroying("patch", "reset", 0.1, 1.0, **LONGER),
    _destroying("dense", "shrink", 0.1, 1.0, **LONGER),
    Condition("patch, relabelled, 240 iterations", "patch", {"density": 0.1, **LONGER}, "patch"),
)
FIRST = (*CORE, *DEEPER)
CONDITIONS = (*FIRST, *(condition for condition in _grid() if condition.name not in {c.name for c in FIRST}))


@dataclass(frozen=True)
class DestroyArguments(SharedArguments):
    """Options of the study."""

    results: str = str(RESULTS)
    """Folder of the records, a line each run."""


def plan(seeds: Sequence[int] = SEEDS, places: Sequence[Place] = PLACES) -> Iterator[Job]:
    """All runs: first the core, place by place with all seeds, then the grid; a seed's conditions stay together."""
    for conditions in (FIRST, CONDITIONS[len(FIRST) :]):
        for preset, pair in places:
            for seed in seeds:
                for condition in conditions:
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


def _by_condition(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each condition that has some, in the order of the plan."""
    by_name = {condition.name: [r for r in records if r["condition"] == condition.name] for condition in CONDITIONS}
    return {name: several for name, several in by_name.items() if several}


def _table(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    attacks = list(records[0]["steps"])
    rows = [["condition", "seeds", "UA, %", "retained accuracy, %", "retained Fréchet", "cover Fréchet", *attacks]]
    for name, several in _by_condition(records).items():
        cells = []
        for key, text in (("ua", "{:.0f}"), ("retain_accuracy", "{:.1f}"), ("frechet_distance", "{:.2f}")):
            cells.append(interval([record["figures"][key] for record in several]).text(text.format))
        cover = interval([record["figures"]["cover_frechet_distance"] for record in several])
        cells.append(cover.text("{:.0f}".format))
        cells += [_steps(several, attack).text("{:.0f}".format) for attack in attacks]
        rows.append([name, str(len(several)), *cells])
    return rows


def _relative(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """How many times the steps against relabel each attack takes, paired by seed."""
    attacks, by_name = list(records[0]["steps"]), _by_condition(records)
    yardstick = {record["seed"]: record for record in by_name.get(RELABEL, ())}
    rows = [["condition", *attacks, "by the strongest"]]
    for name, several in by_name.items():
        if name == RELABEL:
            continue
        pairs = [(record, yardstick[record["seed"]]) for record in several if record["seed"] in yardstick]
        cells = [_quotient([_times(*pair, attack) for pair in pairs]) for attack in attacks]
        weakest = [min((_times(*pair, attack) for attack in attacks), default=(0.0, False)) for pair in pairs]
        rows.append([name, *cells, _quotient(weakest)])
    return rows


def _times(record: Mapping[str, Any], yardstick: Mapping[str, Any], attack: str) -> tuple[float, bool]:
    """Steps of an attack in those that it takes against the yardstick, and whether that is a lower bound."""
    steps, reference = record["steps"][attack], yardstick["steps"][attack]
    end = max(int(step) for step in record["ua"][attack])
    return (end if steps is None else steps) / (end if reference is None else reference), steps is None


def _quotient(values: Sequence[tuple[float, bool]]) -> str:
    result = interval([value for value, _ in values], sum(bound for _, bound in values))
    return "-" if result is None else result.text("{:.2f}".format)


def write_summary(folder: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write report.md and report.html, and return the path of report.md. ValueError if there is nothing to report."""
    if not records:
        raise ValueError(f"results is {str(folder)!r}, which has no runs of this study")
    notes = (
        "Means over the seeds with 95 % t intervals. The columns of the attacks are the steps after which half of the "
        "samples are of the class again; ≥ marks a mean to which some seed that resisted to the end contributes the "
        "last number of steps.",
        "The second table of a place has the same steps relative to those against relabel, paired by seed. The last "
        "column is the least of a seed's quotients: the attack that suits the attacker best.",
    )
    sections = [Section("How to read it", [*map(Text, notes)])]
    by_place: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        by_place.setdefault((record["preset"], record["pair"]), []).append(record)
    for (preset, pair), several in by_place.items():
        title = f"{preset}, {pair.replace('-', ' forgotten, with cover ')}"
        sections.append(Section(title, [figures_table(_table(several)), figures_table(_relative(several))]))
    return write_document(folder, "Destroying before forgetting, relabelling after it", sections)


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
