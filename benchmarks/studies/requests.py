"""Six requests one after the other: patches with disjoint masks against dense rules, and all requests at once.

``python -m pecker_fast.benchmarks.studies.requests`` makes the missing sequences; ``--summary`` only summarises the
finished ones.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pecker_fast.figures import figure
from pecker_fast.metrics.intervals import interval
from pecker_fast.records import read_lines
from pecker_fast.report.blocks import Section, Text, figures_table
from pecker_fast.report.render import write_document
from pecker_fast.runs.distilled import AUTO
from pecker_fast.runs.sequence import SequenceArguments, sequence

from .patch import call

PROGRAM = "python -m pecker_fast.benchmarks.studies.requests"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "requests"
RECORDS = "sequences.jsonl"
CLASSES, COVER = (0, 3, 7, 5, 2, 8), "1"
SAMPLES_PER_CLASS = 100
# As in the study of patches.
COMMON = ("train_batch_size=24", "forget_batch_size=8", "max_train_steps=80")


def _dense(generator: float, score: float, rate: float) -> tuple[str, ...]:
    return (
        f"generator_forget_weight={generator}",
        f"score_forget_weight={score}",
        f"generator_learning_rate={rate}",
    )


@dataclass(frozen=True)
class Rule:
    """A way to forget, with options of ``sequence``."""

    method: str
    set: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


RULES = {
    "patch 0.1": Rule("patch"),
    "patch 0.05": Rule("patch", ("density=0.05",)),
    "pecker+ 0.3/0.02 at 0.00015": Rule("pecker+", _dense(0.3, 0.02, 1.5e-4), {"distilled": AUTO}),
    "sfd 0.05/0.05 at 0.0006": Rule("sfd", _dense(0.05, 0.05, 6e-4), {"distilled": AUTO}),
    "patch 0.1, masks may overlap": Rule("patch", (), {"disjoint": False}),
}
KEPT = ("request", "forget_classes", "ua", "ua_by_class", "retain_accuracy", "worst_retained_accuracy")
KEPT += ("frechet_distance", "frechet_real_split", "diversity", "images", "parameters_changed", "patch_bytes")


@dataclass(frozen=True)
class StudyArguments:
    """Options of the study."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of each rule."""
    rules: tuple[str, ...] = ()
    """Names of rules; all by default."""
    summary: bool = False
    """Make no run: print the table of the finished ones."""
    results: str = str(RESULTS)
    """Folder of the records, a line each sequence."""


def arguments_of(rule: Rule, seed: int, folder: Path) -> SequenceArguments:
    """The options of one sequence of the study."""
    return SequenceArguments(
        forget_classes=CLASSES,
        cover_class=COVER,
        method=rule.method,
        seed=seed,
        output_dir=str(folder),
        samples_per_class=SAMPLES_PER_CLASS,
        set=(*COMMON, *rule.set),
        progress_bar=False,
        **rule.more,
    )


def missing(args: StudyArguments) -> Iterator[tuple[str, int]]:
    """Rule and seed of each sequence without a record, whole seeds first.

    Raises
    ------
    ValueError
        If there is no such rule.
    """
    for name in args.rules:
        if name not in RULES:
            raise ValueError(f"rules has {name!r}, expected some of {', '.join(RULES)}")
    made = {(record["rule"], record["seed"]) for record in read_records(Path(args.results))}
    for seed in args.seeds:
        for name in args.rules or RULES:
            if (name, seed) not in made:
                yield name, seed


def read_records(results: Path) -> list[dict[str, Any]]:
    """A record of each sequence that has ended."""
    path = results / RECORDS
    return list(read_lines(path)) if path.is_file() else []


def make(name: str, seed: int) -> dict[str, Any]:
    """Make one sequence; returns its record. An interrupted one is made again."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments_of(RULES[name], seed, Path(folder))
        sequence(args)
        rows = json.loads((Path(folder) / "sequence.json").read_text())["rows"]
    kept = [{key: row[key] for key in KEPT if key in row} for row in rows]
    return {
        "rule": name,
        "seed": seed,
        "classes": list(CLASSES),
        "cover": COVER,
        "options": list(args.set),
        "rows": kept,
    }


def _least_ua(row: Mapping[str, Any]) -> float:
    return min(row["ua_by_class"].values())


def _cell(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [_least_ua(row) if key == "least_ua" else row.get(key) for row in rows]
    if any(value is None for value in values):
        return "-"
    scale, digits = (1e-3, 0) if key == "patch_bytes" else (1, 2 if key.startswith("frechet") else 1)
    return interval([scale * value for value in values]).text(lambda x: f"{x:.{digits}f}")


COLUMNS = {
    "ua": "UA of all so far, %",
    "least_ua": "UA of the worst class, %",
    "retain_accuracy": figure("retain_accuracy").title,
    "worst_retained_accuracy": "accuracy of the worst retained class, %",
    "frechet_distance": figure("frechet_distance").title,
    "frechet_real_split": "of a random split of real images",
    "parameters_changed": "weights changed by the request, %",
    "patch_bytes": "patch, kB",
}


def write_summary(folder: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write report.md and report.html.

    Parameters
    ----------
    folder : Path
        Of the study's results.
    records : sequence of mapping
        A record of each sequence.

    Returns
    -------
    Path
        Of report.md.

    Raises
    ------
    ValueError
        If there is nothing to report.
    """
    if not records:
        raise ValueError(f"results is {str(folder)!r}, which has no sequences of this study")
    by_rule: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda x: (list(RULES).index(x["rule"]), x["seed"])):
        by_rule.setdefault(record["rule"], []).append(record)
    classes = ", ".join(map(str, CLASSES))
    text = (
        f"The digits {classes} are forgotten one after the other, with cover {COVER}, each request starting from the "
        "result of the last; the last row of a rule forgets all of them in one request. Means over seeds with 95 % t "
        "intervals. The Fréchet distance is of the classes that are still retained, and so is that of real images."
    )
    sections = [Section("How to read it", [Text(text)])]
    for name, several in by_rule.items():
        rows = [["request", "seeds", *COLUMNS.values()]]
        for i, row in enumerate(several[0]["rows"]):
            same = [record["rows"][i] for record in several]
            rows.append([row["request"], str(len(several)), *(_cell(same, key) for key in COLUMNS)])
        sections.append(Section(name, [figures_table(rows)]))
    return write_document(folder, "Six requests one after the other", sections)


def study(args: StudyArguments) -> None:
    """Make the missing sequences, append a line for each, and write the summary."""
    results = Path(args.results)
    if not args.summary:
        torch.set_num_threads(1)
        jobs = list(missing(args))
        results.mkdir(parents=True, exist_ok=True)
        for i, (name, seed) in enumerate(jobs, 1):
            record = make(name, seed)
            with open(results / RECORDS, "a") as file:
                file.write(json.dumps(record) + "\n")
            last = record["rows"][len(CLASSES) - 1]
            line = f"UA {last['ua']:.1f} %, retained {last['retain_accuracy']:.1f} %"
            print(f"[{i} of {len(jobs)}] {name}, seed {seed}: {line}", flush=True)
    report = write_summary(results, read_records(results))
    if args.summary:
        print(report.read_text())
    print(f"report: {report}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Wrong input ends with one line on stderr and exit status 2."""
    call(StudyArguments, study, PROGRAM, arguments)


if __name__ == "__main__":
    main()
