"""The folder of a run: whether it is free, what it holds, and how it is begun anew."""

import json
import shutil
from pathlib import Path
from typing import Any

# Everything that a run writes into its folder, beside subfolders.
RUN_FILES = (
    "config.json",
    "train.jsonl",
    "evaluation.jsonl",
    "metrics.json",
    "environment.json",
    "history.jsonl",
    "evaluation.json",
    "drift.json",
    "mask.safetensors",
    "patch.safetensors",
    "fisher.safetensors",
    "hashes.json",
    "report.md",
    "report.html",
    "report.png",
    "robustness.json",
    "robustness.md",
    "robustness.html",
    "robustness.png",
    "profile.txt",
    "profile.json",
    "trace.json",
    "model_index.json",
    "pipeline.py",
)


def check_folder(folder: Path, resume: str | None, overwrite: bool) -> None:
    """Check that a run may be written into ``folder``, and change nothing.

    Parameters
    ----------
    folder : Path
        Of the run; it need not exist.
    resume : str or None
        The checkpoint to resume from.
    overwrite : bool
        Whether to start over.

    Raises
    ------
    ValueError
        If it is a file, or holds another run and neither ``resume`` nor ``overwrite`` says what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file, expected a folder")
    if resume is None and not overwrite and any((folder / name).exists() for name in ("config.json", "checkpoints")):
        raise ValueError(
            f"output_dir {folder} already has a run: continue it with --resume_from_checkpoint latest, "
            "start over with --overwrite_output_dir, or choose another folder"
        )


def prepare_folder(folder: Path, resume: str | None, overwrite: bool) -> None:
    """Make the folder of a run, or empty it. Arguments and errors: as ``check_folder``'s; also a ValueError if it
    cannot be written to."""
    check_folder(folder, resume, overwrite)
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written to: {error}") from error
    if resume is None and overwrite:
        # Otherwise the earlier run's checkpoints would be taken for this one's.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)


def run_config(folder: Path | None) -> dict[str, Any]:
    """config.json of a run of unlearning; empty if ``folder`` is not the folder of one."""
    try:
        config = json.loads((folder / "config.json").read_text()) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return config if "options" in config and ("forget_classes" in config or "prompts" in config) else {}
