"""Trackers beside train.jsonl: tensorboard, and wandb offline."""

import math
import struct
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from pecker_fast.training import tracking
from pecker_fast.training.tracking import check_tracker, tracker

RECORDS = [
    {"phase": "forget", "step": 2, "loss_distill": 0.5, "seconds": 1.0, "mask": True, "loss_forget": None},
    {"step": 2, "ua": 97.5},
    {"phase": "forget", "step": 4, "loss_distill": 0.25, "seconds": 2.0, "loss_forget": 0.125},
]
# What of it is a figure.
LOGGED = [
    (2, {"loss_distill": 0.5, "seconds": 1.0}),
    (2, {"ua": 97.5}),
    (4, {"loss_distill": 0.25, "seconds": 2.0, "loss_forget": 0.125}),
]


def test_names_and_packages_are_checked(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="report_to is 'wand', expected one of none, tensorboard, wandb; the nearest"):
        check_tracker("wand")
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=f"report_to is '{name}', which is not installed: pip install {name}"):
            check_tracker(name)
    with tracker("none", tmp_path) as log:
        assert log is None
    assert list(tmp_path.iterdir()) == []


class Run:
    """The part of wandb's run that is used, with its signatures."""

    def __init__(self, **how) -> None:
        self.how, self.logged, self.metrics, self.finished = how, [], [], False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict, step: int | None = None, commit: bool | None = None) -> None:
        self.logged.append(data)

    def finish(self, exit_code: int | None = None) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """Runs of a module in place of wandb."""
    made: list[Run] = []

    def init(*, project, name, id, resume, dir, config):
        made.append(Run(project=project, name=name, id=id, resume=resume, dir=dir, config=config))
        return made[-1]

    module = ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(tracking, "find_spec", lambda name: module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return made


def test_what_wandb_gets(runs, tmp_path, monkeypatch):
    folder = tmp_path / "my-run"
    folder.mkdir()
    with tracker("wandb", folder, {"seed": 3}) as log:
        for record in RECORDS:
            log(record)
    (first,) = runs
    assert first.logged == [{**figures, "step": step} for step, figures in LOGGED] and first.finished
    assert first.how["name"] == "my-run" and first.how["dir"] == str(folder) and first.how["config"] == {"seed": 3}
    assert first.how["project"] == "pecker-fast" and first.metrics == [("*", "step")]
    # A resumed run goes on under the same id; another folder is another run.
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    (tmp_path / "other").mkdir()
    for place in (folder, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt), tracker("wandb", place):
            raise KeyboardInterrupt
    _, again, other = runs
    assert again.how["id"] == first.how["id"] != other.how["id"] and again.how["resume"] == "allow"
    assert again.how["project"] == "mine" and again.finished and other.finished


def test_wandb_that_cannot_start_is_one_line(runs, tmp_path, monkeypatch):
    def init(**how):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(ValueError, match=r"cannot start: api_key not .*WANDB_MODE=offline"), tracker("wandb", tmp_path):
        pass


def written_records(data: bytes) -> list[bytes]:
    """The records of a .wandb file: after seven bytes, blocks of 32 KiB of parts with checksum, length and kind."""
    records, place, parts = [], 7, b""
    while place + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0 or 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        parts = (b"" if kind in (1, 2) else parts) + data[place + 7 : place + 7 + length]
        if kind in (1, 4):
            records.append(parts)
        place += 7 + length
    return records


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(tmp_path, monkeypatch):
    """The real package, without a network: the file that wandb sync would send has the figures."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with tracker("wandb", tmp_path, {"options": {"density": 0.5}}) as log:
        for record in RECORDS:
            log(record)
    wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in written_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({name: float(value) for name, value in values.items() if not name.startswith("_")})
    assert rows == [{**figures, "step": step} for step, figures in LOGGED]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracker("tensorboard", tmp_path) as log:
        for record in RECORDS:
            log(record)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = {(name, step): value for step, figures in LOGGED for name, value in figures.items()}
    written = {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    assert written.keys() == expected.keys()
    assert all(math.isclose(written[key], expected[key], rel_tol=1e-6) for key in expected)
