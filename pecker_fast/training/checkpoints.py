"""Checkpoints that survive a kill at any moment: complete under their final name, or absent."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import NotRequired

from ..hashing import file_sha256
from ..records import COUNT, SHA256, RecordError, read_object
from .retired import without_retired
from .state import load_state, save_state

FORMAT, VERSION = "pecker_fast.checkpoint", 1
STATE, MANIFEST = "state.safetensors", "checkpoint.json"
# The option that may be larger when a run goes on.
LENGTH = "max_train_steps"
_ZEROS = "0" * 64
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r"\.checkpoint-\d+\.(tmp|old)")


class FileDigest(TypedDict):
    """Size and sha256 of a file of a checkpoint."""

    bytes: COUNT
    sha256: SHA256


class Manifest(TypedDict):
    """checkpoint.json. Its own sha256 is that of its bytes with zeros in its place; earlier versions have none."""

    format: str
    version: int
    step: COUNT
    fingerprint: dict[str, Any]
    files: dict[str, FileDigest]
    sha256: NotRequired[SHA256]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, another run's, or missing."""


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    """Sync a file; returns its size and sha256."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _differences(own: Any, other: Any, place: str = "") -> list[str]:
    """Where two JSON values differ, with dotted names; ``other`` is the checkpoint's."""
    if isinstance(own, dict) and isinstance(other, dict):
        differences = []
        for key in sorted({*own, *other}):
            inner = f"{place}.{key}" if place else key
            differences += _differences(own.get(key), other.get(key), inner)
        return differences
    return [] if own == other else [f"{place} is {other!r} there and {own!r} here"]


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in a folder. CheckpointError if it is damaged, or another checkpoint's."""
    try:
        manifest = read_object(path / MANIFEST, Manifest, fix="its content is not what was written")
    except RecordError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    kind, version = manifest["format"], manifest["version"]
    if kind != FORMAT or version != VERSION:
        raise CheckpointError(f"{path} has format {kind!r} version {version!r}, expected {FORMAT!r} {VERSION}")
    unknown = sorted(manifest.keys() - Manifest.__annotations__.keys())
    own, content = manifest.get("sha256"), (path / MANIFEST).read_bytes()
    if unknown or (own and hashlib.sha256(content.replace(own.encode(), _ZEROS.encode())).hexdigest() != own):
        raise CheckpointError(f"{path} is damaged: {MANIFEST} is not what was written")
    if STATE not in manifest["files"]:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} does not name {STATE}")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest["files"]):
        raise CheckpointError(f"{path} is damaged: {MANIFEST} names a file outside the folder")
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != manifest["step"]:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} is of step {manifest['step']}")
    return manifest


class Checkpoints:
    """The folder of a run's checkpoints, named ``checkpoint-{step}``.

    Parameters
    ----------
    folder : path
        Created when the first checkpoint is saved.
    total_limit : int, optional
        How many to keep; None keeps all. The oldest ones are removed once a new one is in place.
    fingerprint : dict
        JSON that identifies the run. A checkpoint with another fingerprint is refused.

    Raises
    ------
    ValueError
        If the limit is below 1.
    """

    def __init__(self, folder: str | os.PathLike, total_limit: int | None, fingerprint: dict[str, Any]) -> None:
        if total_limit is not None and (isinstance(total_limit, bool) or total_limit < 1):
            raise ValueError(f"checkpoints_total_limit is {total_limit}, expected at least 1, or None for no limit")
        self.folder = Path(folder)
        self.total_limit = total_limit
        # As it will be read back: tuples become lists in JSON.
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._staged: int | None = None
        # A line about how the run that goes on is longer than it was, once a checkpoint has been loaded.
        self.extended: str | None = None

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _is_whole(self, step: int) -> bool:
        """Whether this run has a complete checkpoint of the step."""
        try:
            return self.path(step).exists() and self._is_ours(self.verify(self.path(step)))
        except CheckpointError:
            return False

    def _is_ours(self, manifest: dict[str, Any]) -> bool:
        return without_retired(manifest["fingerprint"]) == without_retired(self.fingerprint)

    def _temporary(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.tmp"

    def _begin(self, step: int) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._temporary(step).mkdir()
        self._staged = step
        return self._temporary(step)

    def _give_up(self, step: int) -> None:
        shutil.rmtree(self._temporary(step), ignore_errors=True)
        self._staged = None

    def stage(self, step: int, export: Callable[[Path], None]) -> None:
        """Begin a checkpoint with additional files; ``save`` of the same step completes it.

        Parameters
        ----------
        step : int
            Number of the checkpoint.
        export : callable
            Writes the files into the folder that it is called with.

        Raises
        ------
        OSError
            As ``save`` does.
        """
        if self._is_whole(step):
            return
        try:
            export(self._begin(step))
        except BaseException:
            self._give_up(step)
            raise

    def save(self, step: int, tree: Any) -> Path:
        """Write a checkpoint.

        Parameters
        ----------
        step : int
            Number of the checkpoint. A complete checkpoint of this run is left as it is; a damaged one or another run's
            is replaced.
        tree : object
            The state, as ``save_state`` takes it.

        Returns
        -------
        Path
            Its folder.

        Raises
        ------
        OSError
            For example if the disk is full. Earlier checkpoints are left as they were.
        """
        final = self.path(step)
        if self._is_whole(step):
            return final
        temporary = self._temporary(step) if self._staged == step else self._begin(step)
        try:
            save_state(temporary / STATE, tree)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "step": step,
                "fingerprint": self.fingerprint,
                "files": {path.relative_to(temporary).as_posix(): _digest(path) for path in files},
                "sha256": _ZEROS,
            }
            content = json.dumps(manifest, indent=1, sort_keys=True).encode()
            with open(temporary / MANIFEST, "wb") as file:
                file.write(content.replace(_ZEROS.encode(), hashlib.sha256(content).hexdigest().encode()))
                file.flush()
                os.fsync(file.fileno())
            for folder in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
                _sync_folder(folder)
            if final.exists():
                self._remove(final)
            os.rename(temporary, final)
            _sync_folder(self.folder)
            self._staged = None
        except BaseException:
            self._give_up(step)
            raise
        if self.total_limit is not None:
            for old in self.steps()[: -self.total_limit]:
                if old != step:
                    self._remove(self.path(old))
        return final

    def _remove(self, path: Path) -> None:
        # Renamed first: a checkpoint that a kill left half removed must not look like one.
        aside = path.with_name(f".{path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for entry in self.folder.iterdir():
            if _TEMPORARY.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)

    def _resolve(self, which: str | int | os.PathLike) -> Path:
        if which == "latest":
            steps = self.steps()
            if not steps:
                raise CheckpointError(f"resume_from_checkpoint is 'latest', but {self.folder} has no checkpoint")
            return self.path(steps[-1])
        if isinstance(which, int):
            path = self.path(which)
        else:
            path = Path(which)
            if not path.is_dir() and _NAME.fullmatch(str(which)):
                path = self.folder / which
        if not path.is_dir():
            names = ", ".join(self.path(step).name for step in self.steps()) or "no checkpoint"
            raise CheckpointError(
                f"resume_from_checkpoint is {str(which)!r}, no such folder; {self.folder} has {names}"
            )
        return path

    def _alternative(self, path: Path) -> str:
        """Names the newest complete checkpoint of this run before ``path``."""
        match = _NAME.fullmatch(path.name)
        for step in reversed(self.steps()):
            if match and step >= int(match[1]):
                continue
            try:
                if self._differences(self.verify(self.path(step))):
                    continue
            except CheckpointError:
                continue
            return f"; the one before it is complete: --resume_from_checkpoint checkpoint-{step}"
        return "; there is no earlier one of this run"

    def verify(self, path: Path) -> dict[str, Any]:
        """Read every file of a checkpoint; returns its manifest. CheckpointError if it is damaged."""
        manifest = _manifest(path)
        for name, digest in manifest["files"].items():
            if not (path / name).is_file():
                raise CheckpointError(f"{path} is damaged: {name} is missing")
            if _digest(path / name) != digest:
                raise CheckpointError(f"{path} is damaged: {name} is not what was written")
        return manifest

    def load(self, which: str | int | os.PathLike) -> tuple[int, Any]:
        """Read a checkpoint.

        Parameters
        ----------
        which : str, int or path
            "latest", a step, "checkpoint-100" or a path.

        Returns
        -------
        step : int
            Its step.
        state : object
            What ``save`` was given.

        Raises
        ------
        CheckpointError
            If it is damaged, missing, or another run's; the message says how the runs differ, and names the newest
            complete checkpoint before it.
        """
        path = self._resolve(which)
        try:
            manifest = self.verify(path)
            differences = self._differences(manifest)
            if differences:
                raise CheckpointError(
                    f"{path} is of another run: {'; '.join(differences)} (only {LENGTH} may be larger; how often a run "
                    "logs, evaluates and saves may change)"
                )
            state = load_state(path / STATE)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._alternative(path)}") from error
        self.extended = self._extension(manifest)
        return manifest["step"], state

    def _differences(self, manifest: dict[str, Any]) -> list[str]:
        """How this run differs from that of a checkpoint, except in being longer."""
        own, other = without_retired(self.fingerprint), without_retired(manifest["fingerprint"])
        if self._lengths(manifest) is not None:
            other = {**other, "options": {**other["options"], LENGTH: own["options"][LENGTH]}}
        return _differences(own, other)

    def _lengths(self, manifest: dict[str, Any]) -> tuple[int, int] | None:
        """The length of a checkpoint's run and of this one if this one is longer."""
        options = [x.get("options") for x in (manifest["fingerprint"], self.fingerprint)]
        before, now = (x.get(LENGTH) if isinstance(x, dict) else None for x in options)
        return (before, now) if isinstance(before, int) and isinstance(now, int) and now > before else None

    def _extension(self, manifest: dict[str, Any]) -> str | None:
        lengths = self._lengths(manifest)
        if lengths is None:
            return None
        text = f"{LENGTH} was {lengths[0]} and is {lengths[1]}: the run goes on from step {manifest['step']}"
        scheduler = self.fingerprint["options"].get("lr_scheduler", "constant")
        return text if scheduler == "constant" else f"{text}, with the learning rates of a run of {lengths[1]}"
