"""The change of a network's weights in a run as a small file, and the network again from it."""

import shutil
from pathlib import Path
from typing import Literal

import safetensors.torch

from ..delta import apply_delta, save_delta
from ..files import write_folder
from ..models import resolve_weights
from ..models.folders import WEIGHTS
from .arguments import check_output


def delta(
    action: Literal["save", "apply"],
    base: str,
    output: str,
    changed: str | None = None,
    delta: str | None = None,
) -> str:
    """Save the change of a network's weights in a run, or apply it to the network that the run started from.

    The file holds a bit for each entry, and the values of those that changed: it is small if a method leaves most
    weights as they were. sha256 of both ends are checked.

    Parameters
    ----------
    action : {"save", "apply"}
        What to do.
    base : str
        Folder of the network that the run started from: of a U-Net, a pipeline or a run.
    output : str
        The file to save, which ends with .safetensors; or the folder for the network that applying gives.
    changed : str, optional
        For save: folder of the run's result.
    delta : str, optional
        For apply: the file.

    Returns
    -------
    str
        What was done, in a line to read.

    Raises
    ------
    ValueError
        If an option is missing, a file cannot be read, or the weights are not those that the file belongs to.
    """
    if action == "save":
        return _save(base, changed, output)
    return _apply(base, delta, output)


def _save(base: str, changed: str | None, output: str) -> str:
    if changed is None:
        raise ValueError("changed is not given: expected the folder of the run's result")
    if not output.endswith(".safetensors"):
        raise ValueError(f"output is {output!r}, expected a file that ends with .safetensors")
    check_output(output)
    _, before = resolve_weights(base, name="base")
    _, after = resolve_weights(changed, name="changed")
    summary = save_delta(before, after, output)
    share = f"{summary.changed:,d} of {summary.numel:,d} entries changed ({summary.density:.1%})"
    return f"{share}, {summary.bytes:,d} bytes: {output}"


def _apply(base: str, path: str | None, output: str) -> str:
    if path is None:
        raise ValueError("delta is not given: expected the file that delta save wrote")
    if Path(output).exists():
        raise ValueError(f"output is {output!r}, which exists already")
    folder, weights = resolve_weights(base, name="base")
    result = apply_delta(weights, path)

    def write(target: Path) -> None:
        shutil.copyfile(folder / "config.json", target / "config.json")
        if (folder / "scheduler").is_dir():
            shutil.copytree(folder / "scheduler", target / "scheduler")
        safetensors.torch.save_file(result, target / f"{WEIGHTS}.safetensors", {"format": "pt"})

    write_folder(output, write)
    return f"applied and verified: {output}"
