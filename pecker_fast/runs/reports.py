"""The report of a run, written again."""

from pathlib import Path

from ..report import RunRecord, card_note, cautions, write_run_report
from .audit import changed_files


def write_report(run: str | Path) -> tuple[Path, list[str]]:
    """Write report.md, report.html and the model card of a run again, with everything measured since it ended.

    Parameters
    ----------
    run : str or Path
        Folder of a run of unlearning that has ended.

    Returns
    -------
    tuple of Path and list of str
        report.md, and notes: which files have changed since the run ended, when figures say little, and why the model
        card is not refreshed.

    Raises
    ------
    ValueError
        If there is no such folder, or the run has not ended.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"run is {str(run)!r}, no such folder")
    changed = changed_files(folder)
    path = write_run_report(folder, changed=changed)
    notes = [f"changed since the run ended: {', '.join(changed)}"] if changed else []
    notes += [f"caution: {text}" for text in cautions(RunRecord.read(folder).metrics)]
    note = card_note(folder)
    return path, notes if note is None else [*notes, note]
