"""The folder of a run: whether it is free, what it holds, and how it is begun anew."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..checks import check_utf8
from ..files import replacing
from ..locks import locked
from ..run_records import read_config

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
    "wandb-id.txt",
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
    # Neither safetensors nor reports could be written.
    check_utf8("output_dir", folder.absolute())
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file, expected a folder")
    if resume == "latest" and (folder / "metrics.json").is_file() and not any(folder.glob("checkpoints/checkpoint-*")):
        raise ValueError(
            f"output_dir {folder} has a run that has ended, and none of its checkpoints: it cannot be continued; start "
            "over with --overwrite_output_dir and without --resume_from_checkpoint, or choose another folder"
        )
    if resume is None and not overwrite and any((folder / name).exists() for name in ("config.json", "checkpoints")):
        raise ValueError(
            f"output_dir {folder} already has a run: continue it with --resume_from_checkpoint latest (with a larger "
            "max_train_steps if it has ended), start over with --overwrite_output_dir, or choose another folder"
        )


@contextmanager
def owning(folder: Path) -> Iterator[Callable[[], None]]:
    """Yields a function that takes the lock of a run's folder once it exists; it is held until the end of the context.

    The function raises LockedError, a ValueError, if another process is writing the folder. Only the main process of a
    run calls it.
    """
    with ExitStack() as stack:
        taken = False

        def take() -> None:
            nonlocal taken
            if taken or not folder.is_dir():
                return
            try:
                stack.enter_context(locked(folder))
            except OSError as error:
                raise ValueError(f"output_dir {folder} cannot be written to: {error}") from error
            taken = True

        yield take


def prepare_folder(folder: Path, resume: str | None, overwrite: bool, take: Callable[[], None]) -> None:
    """Make the folder of a run, or empty it; with the lock goes what killed processes left there.

    Arguments and errors: as ``check_folder``'s; ``take`` is the function of ``owning``. Also a ValueError if the folder
    cannot be written to.
    """
    check_folder(folder, resume, overwrite)
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        take()
        # Another run may have begun here since.
        check_folder(folder, resume, overwrite)
        with replacing(folder / "writable") as probe:
            probe.touch()
        (folder / "writable").unlink()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written to: {error}") from error
    if resume is None and overwrite:
        # Otherwise the earlier run's checkpoints would be taken for this one's.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)


def run_config(folder: Path | None) -> dict[str, Any]:
    """config.json of a run of unlearning; empty if the folder is not that of one. RecordError if it is damaged."""
    if folder is None or not (folder / "config.json").is_file():
        return {}
    config = read_config(folder)
    return config if "options" in config and ("forget_classes" in config or "prompts" in config) else {}
