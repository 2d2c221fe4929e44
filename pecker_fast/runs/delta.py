"""``pecker-fast delta``: what a run changed in a network's weights as a small file, and the network again from it."""

import shutil
from pathlib import Path
from typing import Literal

import safetensors.torch
import tyro

from ..delta import apply_delta, save_delta
from ..files import write_folder
from ..models import resolve_weights
from ..models.folders import WEIGHTS
from .options import check_output


def delta(
    action: tyro.conf.Positional[Literal["save", "apply"]],
    base: str,
    output: str,
    changed: str | None = None,
    delta: str | None = None,
) -> None:
    """Saves what a run changed (a bit for each entry, and the values of those that changed), or applies it to the
    network that the run began with; sha256 of both ends are checked. It is small where a method leaves most weights as
    they were.

    Args:
        action: save or apply.
        base: Folder of the network that the run began with: of a U-Net, a pipeline or a run.
        output: The file to save, which ends with .safetensors, or the folder for the network that applying gives.
        changed: For save: folder of what the run left.
        delta: For apply: the file.
    """
    if action == "save":
        _save(base, changed, output)
    else:
        _apply(base, delta, output)


def _save(base: str, changed: str | None, output: str) -> None:
    if changed is None:
        raise ValueError("changed is not given: expected the folder of what the run left")
    if not output.endswith(".safetensors"):
        raise ValueError(f"output is {output!r}, expected a file that ends with .safetensors")
    check_output(output)
    _, before = resolve_weights(base, name="base")
    _, after = resolve_weights(changed, name="changed")
    result = save_delta(before, after, output)
    share = f"{result.changed:,d} of {result.numel:,d} entries changed ({result.density:.1%})"
    print(f"{share}, {result.bytes:,d} bytes: {output}")


def _apply(base: str, path: str | None, output: str) -> None:
    if path is None:
        raise ValueError("delta is not given: expected the file that delta save wrote")
    if Path(output).exists():
        raise ValueError(f"output is {output!r}, which is there already")
    folder, weights = resolve_weights(base, name="base")
    changed = apply_delta(weights, path)

    def write(target: Path) -> None:
        shutil.copyfile(folder / "config.json", target / "config.json")
        if (folder / "scheduler").is_dir():
            shutil.copytree(folder / "scheduler", target / "scheduler")
        safetensors.torch.save_file(changed, target / f"{WEIGHTS}.safetensors", {"format": "pt"})

    write_folder(output, write)
    print(f"applied and verified: {output}")
