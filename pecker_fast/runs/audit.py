"""What a run leaves for an audit: how far each layer has moved, the last mask, and the hashes of its files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diffusion.networks import unwrap
from ..environment import environment
from ..files import write_json
from ..hashing import file_sha256, weights_hash
from ..mask import SaliencyMask
from ..metrics.drift import Drift, grouped, total, trained_percent, weight_drift
from ..profiling import peak_memory_bytes
from ..report import write_run_report
from ..training.loop import Progress
from ..unlearning.masking import module_of

HASHES = "hashes.json"
# What the hashes are of, beside the folders of the generator.
HASHED = (
    "config.json",
    "train.jsonl",
    "evaluation.jsonl",
    "metrics.json",
    "environment.json",
    "profile.json",
    "drift.json",
    "mask.safetensors",
    "model_index.json",
    "pipeline.py",
)
HASHED_FOLDERS = ("unet", "scheduler")


def record_weights(folder: Path, network: nn.Module, start: nn.Module, mask: SaliencyMask | None) -> dict[str, Any]:
    """Writes drift.json and, where there is a mask, mask.safetensors; returns what metrics.json says of them.

    ``network`` as it is kept, ``start`` the weights that it had at first, on any device.

    drift.json: for the network in all, its parts and its layers "parameters", "changed" (share of entries that differ
    at all from ``start``), "drift" (||theta - theta_0|| / ||theta_0||, None where theta_0 is zero) and, with a mask,
    "salient" (share of entries in it).
    """
    drifts = weight_drift(unwrap(network), unwrap(start))
    salient = None
    if mask is not None:
        mask.save(folder / "mask.safetensors")
        salient = dict(zip(mask.names, mask.tensor_counts(), strict=True))

    def described(drift: Drift, names: Iterable[str]) -> dict[str, Any]:
        said = {"parameters": drift.entries, "changed": drift.changed / max(1, drift.entries), "drift": drift.relative}
        if salient is not None:
            said["salient"] = sum(salient[name] for name in names) / max(1, drift.entries)
        return said

    def by(group) -> dict[str, Any]:
        members: dict[str, list[str]] = {}
        for name in drifts:
            members.setdefault(group(name), []).append(name)
        return {key: described(drift, members[key]) for key, drift in grouped(drifts, group).items()}

    whole = described(total(drifts.values()), drifts)
    layers = by(lambda name: name.rpartition(".")[0] or name)
    write_json(folder / "drift.json", {"total": whole, "modules": by(module_of), "layers": layers})
    return {
        "drift_norm": whole["drift"],
        "parameters_changed": 100 * whole["changed"],
        "parameters_trained": trained_percent(network),
        "weights_sha256": weights_hash(network),
    }


def record_result(
    folder: Path, metrics: dict[str, Any], ema_decay: float | None, progress: Progress, device: torch.device
) -> None:
    """Adds to ``metrics``, in place, what every run says of itself; writes metrics.json, environment.json and
    hashes.json, of files that are there by then, and the report.

    ``ema_decay``: of the method's options. ``device``: whose peak memory is told.
    """
    metrics |= {
        "weights": "live" if ema_decay is None else "ema",
        "images": progress.images,
        "iterations": progress.step,
        "seconds": progress.seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    described = environment()
    if "protocol" in metrics:
        metrics["protocol"]["packages"] = described["packages"]
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "environment.json", described)
    record_hashes(folder)
    write_run_report(folder)


def record_hashes(folder: Path, names: Iterable[str] | None = None) -> None:
    """Writes size and sha256 of files of a run into hashes.json: of those ``names``, or of all that a run leaves."""
    path = folder / HASHES
    found: dict[str, Any] = {}
    if names is None:
        files = [folder / name for name in HASHED]
        files += [file for place in HASHED_FOLDERS for file in sorted((folder / place).rglob("*"))]
    else:
        found = json.loads(path.read_text()) if path.is_file() else {}
        files = [folder / name for name in names]
    for file in files:
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            found[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    write_json(path, found)


def changed_files(folder: Path) -> list[str]:
    """The files of a run that are no longer what hashes.json says, or are gone."""
    path = folder / HASHES
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    return [
        name
        for name, said in recorded.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != said["sha256"]
    ]


def update_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Replaces a run's metrics.json by what has been measured since, and writes its report anew. The file's hash
    follows, unless somebody else had changed the file."""
    unchanged = "metrics.json" not in changed_files(folder)
    write_json(folder / "metrics.json", metrics)
    if unchanged and (folder / HASHES).is_file():
        record_hashes(folder, ["metrics.json"])
    if (folder / "report.md").is_file():
        write_run_report(folder, changed_files(folder))
