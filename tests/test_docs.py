"""The examples of the documentation run."""

import re
from pathlib import Path

import pytest

import pecker_fast as pf

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (name, block)
    for name in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
]
_unlearn = pf.unlearn


def test_there_are_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_example_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The documented call with few iterations and samples: that it works, not what it measures.
    short = {"max_train_steps": 2, "samples_per_class": 4, "progress_bar": False}
    monkeypatch.setattr(pf, "unlearn", lambda *args, **options: _unlearn(*args, **{**options, **short}), raising=False)
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


def test_documented_files_exist():
    for name in PAGES:
        for path in re.findall(
            r"`((?:pecker_fast|tests|csrc|kernels|benchmarks)/[\w/]+\.\w+)`", (ROOT / name).read_text()
        ):
            assert (ROOT / path).exists(), f"{name} names {path}"
