"""What a run leaves for an audit: the drift of each layer, the last mask, its figures and the hashes of its files.

Whatever changes metrics.json after the run goes through ``update_metrics``.
"""

from collections.abc import Callable, Iterable
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
from ..run_records import read_hashes
from ..training.loop import Progress
from ..unlearning.masking import module_of
from .history import record_event

HASHES = "hashes.json"
# The files that are hashed, beside the folders of the network.
HASHED = (
    "config.json",
    "train.jsonl",
    "evaluation.jsonl",
    "metrics.json",
    "environment.json",
    "history.jsonl",
    "profile.json",
    "drift.json",
    "mask.safetensors",
    "model_index.json",
    "pipeline.py",
)
HASHED_FOLDERS = ("unet", "score", "scheduler")


def record_weights(folder: Path, network: nn.Module, start: nn.Module, mask: SaliencyMask | None) -> dict[str, Any]:
    """Writes drift.json and, if there is a mask, mask.safetensors.

    drift.json describes the whole network, its parts and its layers: "parameters", "changed" (the share of the weights
    that differ from ``start`` at all), "drift" (||theta - theta_0|| / ||theta_0||, None if theta_0 is zero) and, with a
    mask, "salient" (the share of the weights in it).

    Parameters
    ----------
    folder : Path
        Of the run.
    network : Module
        With the weights that are saved.
    start : Module
        With the weights that training began with, on any device.
    mask : SaliencyMask or None
        The last mask.

    Returns
    -------
    dict
        The figures of the weights for metrics.json.
    """
    drifts = weight_drift(unwrap(network), unwrap(start))
    salient = None
    if mask is not None:
        mask.save(folder / "mask.safetensors")
        salient = dict(zip(mask.names, mask.tensor_counts(), strict=True))

    def described(drift: Drift, names: Iterable[str]) -> dict[str, Any]:
        entries = max(1, drift.entries)
        result = {"parameters": drift.entries, "changed": drift.changed / entries, "drift": drift.relative}
        if salient is not None:
            result["salient"] = sum(salient[name] for name in names) / entries
        return result

    def by(group: Callable[[str], str]) -> dict[str, Any]:
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
    """Writes metrics.json, environment.json, the end of history.jsonl, hashes.json of the files that exist by then, and
    the report.

    Parameters
    ----------
    folder : Path
        Of the run.
    metrics : dict
        The figures so far. Those that every run has are added in place.
    ema_decay : float or None
        Of the method's options.
    progress : Progress
    device : torch.device
        The device whose peak memory is recorded.
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
    record_event(folder, "ended", progress.step)
    record_hashes(folder)
    write_run_report(folder)


def record_hashes(folder: Path, names: Iterable[str] | None = None) -> None:
    """Writes size and sha256 of a run's files into hashes.json: of ``names``, or of all files that a run leaves."""
    path = folder / HASHES
    hashes: dict[str, Any] = {}
    if names is None:
        files = [folder / name for name in HASHED]
        files += [file for place in HASHED_FOLDERS for file in sorted((folder / place).rglob("*"))]
    else:
        hashes = read_hashes(folder)
        files = [folder / name for name in names]
    for file in files:
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            hashes[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    write_json(path, hashes)


def changed_files(folder: Path) -> list[str]:
    """The files of a run that differ from hashes.json, or are gone."""
    hashes = read_hashes(folder)
    return [
        name
        for name, recorded in hashes.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != recorded["sha256"]
    ]


def update_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Replaces a run's metrics.json and refreshes its report. The only way in which metrics.json changes after a run.

    The file's hash is updated too, unless the file had already been changed by somebody else.
    """
    unchanged = "metrics.json" not in changed_files(folder)
    write_json(folder / "metrics.json", metrics)
    if unchanged and (folder / HASHES).is_file():
        record_hashes(folder, ["metrics.json"])
    if (folder / "report.md").is_file():
        write_run_report(folder, changed_files(folder))
