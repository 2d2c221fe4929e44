"""The examples of the documentation run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = [
    (name, block)
    for name in ("README.md", "CONTRIBUTING.md")
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
]


def test_there_are_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_example_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


def test_documented_files_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        for path in re.findall(
            r"`((?:pecker_fast|tests|csrc|kernels|benchmarks)/[\w/]+\.\w+)`", (ROOT / name).read_text()
        ):
            assert (ROOT / path).exists(), f"{name} names {path}"
