"""Reports written again: of a run, a comparison, a sequence or a demo."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import clear_leftovers
from ..records import RecordError, read_object
from ..report import (
    CLASSES,
    PROMPTS,
    RunRecord,
    card_note,
    cautions,
    read_across,
    write_across,
    write_comparison,
    write_concept_sequence,
    write_robustness_across,
    write_run_report,
    write_sequence,
)
from ..run_records import read_file
from .audit import changed_files

COMPARED, SEQUENCE, ATTACKED = "compare.json", "sequence.json", "robustness.json"


def write_report(run: str) -> tuple[Path, list[str]]:
    """Write the report of a run again, with everything measured since it ended, or that of a comparison, a sequence or
    a demo.

    Parameters
    ----------
    run : str
        Folder of a run of unlearning or distillation that has ended; or of a comparison, a sequence or a demo.

    Returns
    -------
    tuple of Path and list of str
        The report (.md, with .html beside it), and notes: which files have changed since a run ended, when figures say
        little, and why its model card is not refreshed.

    Raises
    ------
    ValueError
        If there is no such folder, or it has nothing to report. Nothing is written then.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"run is {run!r}, no such folder")
    # A request of a sequence of concepts is a run that has such a file, too.
    if (folder / SEQUENCE).is_file() and not (folder / "config.json").is_file():
        return _sequence(folder), []
    if (folder / COMPARED).is_file():
        return _comparison(folder)
    method = read_file(folder, "config").get("method")
    if not (folder / "metrics.json").is_file() or method is None:
        raise ValueError(
            f"run is {run!r}, which has no metrics.json and config.json of a run, no {COMPARED} and no {SEQUENCE}: "
            "expected the folder of a run that has ended, of a comparison, a sequence or a demo"
        )
    if method == "pretrain":
        raise ValueError(f"run is {run!r}, a run of pretrain, which has no report: its figures are in metrics.json")
    clear_leftovers(folder)
    changed = changed_files(folder)
    path = write_run_report(folder, changed=changed)
    notes = [f"changed since the run ended: {', '.join(changed)}"] if changed else []
    notes += caution_lines(RunRecord.read(folder).metrics)
    note = card_note(folder)
    return path, notes if note is None else [*notes, note]


def caution_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What makes figures of a run doubtful, a line each."""
    return [f"caution: {text}" for text in cautions(metrics)]


def earlier_runs(folder: Path) -> dict[str, list[int | None]]:
    """The seeds of each method in the comparison that a folder already has; empty if it has none."""
    try:
        methods = _read(folder / COMPARED).get("methods")
    except RecordError:
        return {}
    if not isinstance(methods, dict) or not all(isinstance(several, list) for several in methods.values()):
        return {}
    return {name: [metrics.get("seed") for metrics in several] for name, several in methods.items()}


def _sequence(folder: Path) -> Path:
    """Write the report of a sequence of classes or of concepts again."""
    if "concepts" not in _read(folder / SEQUENCE):
        return write_sequence(folder)[0]
    # Imported only if needed: it brings libraries that take a while.
    from .prompts.sequence import COLUMNS

    return write_concept_sequence(folder, COLUMNS)[0]


def _comparison(folder: Path) -> tuple[Path, list[str]]:
    """Write the report of a comparison or a demo again."""
    compared = read_object(folder / COMPARED)
    clear_leftovers(folder)
    if "command" not in compared:
        # A demo's, with a run of each method below it.
        return write_comparison(folder, {name: folder / name for name in compared.get("methods", ())}), []
    recorded, arguments = read_across(folder / COMPARED)
    runs = {name: [_newest(record, folder / name) for record in several] for name, several in recorded.items()}
    own = {*PROMPTS.columns} - {*CLASSES.columns}
    of_prompts = any(run.metrics.get(key) is not None for several in runs.values() for run in several for key in own)
    pictures = [
        ("concept.png", "Prompts of the concept, with the same noise for every method."),
        ("near.png", "Prompts of near concepts, which should be preserved."),
    ]
    path = write_across(
        folder,
        runs,
        seconds="--no-seconds" not in arguments["command"].replace("_", "-").split(),
        pictures=[(name, text) for name, text in pictures if (folder / name).is_file()],
        shown=PROMPTS if of_prompts else CLASSES,
        **arguments,
    )
    if "groups" in _read(folder / ATTACKED):
        return path, [f"report of the attacks: {write_robustness_across(folder)}"]
    return path, []


def _newest(record: RunRecord, place: Path) -> RunRecord:
    """The run as its folder has it now; as it was recorded if the folder is gone. ``place``: of a row without seeds."""
    for folder in (record.folder, place):
        if (folder / "metrics.json").is_file():
            return RunRecord.read(folder)
    return record


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none. RecordError if it is damaged."""
    return read_object(path) if path.is_file() else {}
