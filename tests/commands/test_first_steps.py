"""What a new user may do: other folders than those of a command, narrow terminals and other encodings."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest

from pecker_fast import cli
from pecker_fast.cli import COMMANDS, main
from tests.commands.case import fails
from tests.documented import help_text

RECORDS = {
    "run": ("config.json", {"options": {}, "forget_classes": [0], "preset": "digits", "method": "sfd"}),
    "compared": ("compare.json", {}),
    "sequence": ("sequence.json", {}),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Folders that a run, a comparison and a sequence have left their records in, and a file."""
    monkeypatch.chdir(tmp_path)
    for name, (file, record) in RECORDS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(record))
    (tmp_path / "file").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --output_dir run", "output_dir run has a run, whose report would be lost"),
        ("demo --resume --output_dir sequence", "output_dir sequence has a sequence, whose report would be lost"),
        ("demo --output_dir file", "output_dir file is a file, expected a folder"),
        ("compare --methods sfd --output_dir run", "output_dir run has a run"),
        ("compare --methods sfd --output_dir sequence", "output_dir sequence has a sequence"),
        ("sequence --forget_classes 0 --output_dir run", "output_dir run has a run"),
        ("sequence --forget_classes 0 --output_dir compared", "output_dir compared has a comparison"),
        ("sequence --preset sd15-celebrity --output_dir compared", "output_dir compared has a comparison"),
        ("evaluate run --celebrity_detector X", "there is no option --celebrity_detector"),
        ("evaluate --preset digits --samples_per_class 0", "samples_per_class is 0, expected at least 2"),
        ("compare --runs nowhere.json", "expected compare.json of a comparison: nowhere.json cannot be read: No such"),
        ("compare --runs run/config.json", "expected compare.json of a comparison: it has no 'asked' (see"),
        ("patch diff one", "items is one, expected two networks or two patch files"),
    ],
)
def test_wrong_folders_are_refused_and_left_as_they_are(place, capsys, words, message):
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert message in fails(capsys, *words.split())
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_a_terminal_cannot_show(monkeypatch, encoding):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", output)
    module = SimpleNamespace(parse=lambda words: lambda: print("café кошка \udcff"))
    monkeypatch.setattr("pecker_fast.cli.importlib.import_module", lambda *names: module)
    main(["env"])
    expected = {
        "ascii": "caf\\xe9 \\u043a\\u043e\\u0448\\u043a\\u0430 \\udcff",
        "latin-1": "café \\u043a\\u043e\\u0448\\u043a\\u0430 \\udcff",
        "utf-8": "café кошка \\udcff",
    }
    assert output.buffer.getvalue() == f"{expected[encoding]}\n".encode(encoding)


@pytest.mark.parametrize(
    ("environment", "command", "expected"),
    [
        ({}, "report", "1000"),
        ({}, "bench", None),
        ({"OMP_WAIT_POLICY": "active"}, "report", None),
        ({"GOMP_SPINCOUNT": "5"}, "report", "5"),
        ({"KMP_BLOCKTIME": "200"}, "report", None),
    ],
)
def test_how_threads_wait_is_settled_before_torch_is_loaded(monkeypatch, environment, command, expected):
    seen = []

    def load(name: str, *_: str) -> SimpleNamespace:
        seen.append(os.environ.get("GOMP_SPINCOUNT"))
        return SimpleNamespace(parse=lambda words: lambda: None)

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        # Set first, so that what the command sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli.importlib, "import_module", load)
    # In a process that has torch, as from Python, it would be too late.
    main([command])
    assert seen == [environment.get("GOMP_SPINCOUNT")]
    fresh = SimpleNamespace(modules={}, stdout=sys.stdout, stderr=sys.stderr)
    monkeypatch.setattr(cli, "sys", fresh)
    main([command])
    assert seen[1] == expected


def test_help_fits_a_narrow_terminal(monkeypatch):
    """Apart from usage, examples and single words that are longer, as names of options may be."""
    monkeypatch.setenv("COLUMNS", "40")
    for name in COMMANDS.keys() - {"patch"}:
        text = help_text([name], "--help_all").partition("\nexamples:")[0]
        long = [line for line in text.splitlines()[1:] if len(line) > 40 and len(line.split()) > 4]
        assert not long, (name, long)
