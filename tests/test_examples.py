"""The examples run."""

import json
import runpy
from pathlib import Path

import pytest

import pecker_fast as pf

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_training_loop_with_masked_adam(capsys):
    runpy.run_path(str(EXAMPLES / "masked_adam_loop.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "before: digit 3" in output and "weights changed" in output


@pytest.fixture
def short(monkeypatch):
    """``pf.unlearn`` makes two iterations and draws four samples of each class."""
    unlearn, few = pf.unlearn, {"max_train_steps": 2, "samples_per_class": 4}
    monkeypatch.setattr(pf, "unlearn", lambda *args, **options: unlearn(*args, **{**options, **few}), raising=False)


def test_unlearning_from_python(tmp_path, capsys, short):
    runpy.run_path(str(EXAMPLES / "unlearn_digits.py"))["main"](str(tmp_path / "run"), 2)
    output = capsys.readouterr().out
    assert "ua:" in output and "3 images" in output and (tmp_path / "run" / "report.md").is_file()


def test_notebook(tmp_path, monkeypatch, capsys, short):
    """Its cells in order."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "unlearn_digits.ipynb").read_text())["cells"]
    variables: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "notebook", "exec"), variables)
            assert not cell["outputs"]
    assert len(variables["images"]) == 5 and "report" in capsys.readouterr().out
