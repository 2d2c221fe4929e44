"""The demo: which runs it makes on a preset, and how it goes on after an interruption."""

import json

import pytest

from pecker_fast.runs import demo as module
from pecker_fast.runs.demo import METHODS, demo
from pecker_fast.runs.distilled import with_distilled
from pecker_fast.runs.task import task_of
from pecker_fast.runs.unlearn import Outcome


@pytest.fixture
def runs(monkeypatch):
    """The options of the runs that are made. In place of each run its record is written; the run called ``stop`` leaves
    a checkpoint instead and ends the demo."""
    made, stop = [], set()

    def unlearn(args, before=None):
        made.append(args)
        args.folder.mkdir(parents=True, exist_ok=True)
        (args.folder / "config.json").write_text(json.dumps(task_of(args).describe(with_distilled(args))))
        if args.method in stop:
            (args.folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
            raise SystemExit(143)
        metrics = {"method": args.method}
        (args.folder / "metrics.json").write_text(json.dumps(metrics))
        return Outcome(metrics, None)

    monkeypatch.setattr(module, "unlearn", unlearn)
    monkeypatch.setattr(module, "write_comparison", lambda folder, runs: folder / "report.md")
    monkeypatch.setattr(module, "comparison_table", lambda metrics: " ".join(metrics))
    return made, stop


def test_it_goes_on_where_it_was_interrupted(runs, tmp_path):
    made, stop = runs
    stop.add("pecker")
    words = {"output_dir": str(tmp_path), "max_train_steps": 7}
    with pytest.raises(SystemExit):
        demo(**words)
    assert [args.method for args in made] == ["patch", "pecker"]
    stop.clear(), made.clear()
    report, table = demo(**words, resume=True)
    assert [args.method for args in made] == ["pecker", "sfd", "relabel"] and table == " ".join(METHODS)
    assert [args.loop.resume_from_checkpoint for args in made] == ["latest", None, None]
    assert report == tmp_path / "report.md" and json.loads((tmp_path / "metrics.json").read_text()) == {
        "method": "patch"
    }
    # With other options it is another demo.
    with pytest.raises(ValueError, match="has a run with another options"):
        demo(output_dir=str(tmp_path), max_train_steps=8, resume=True)
    made.clear()
    demo(**words)
    assert [args.method for args in made] == list(METHODS)


def test_presets(runs, tmp_path):
    made, _ = runs
    demo(output_dir=str(tmp_path))
    # PECKER and SFD distil while they forget.
    assert [args.request.distilled for args in made] == [None, None, None, "auto"]
    made.clear()
    demo(output_dir=str(tmp_path), preset="mnist")
    assert [args.request.distilled for args in made] == ["auto"] * 4
    assert {args.options.max_train_steps for args in made[:3]} == {60} and {args.preset for args in made} == {"mnist"}
    with pytest.raises(ValueError, match="preset is 'cifar10', which has no network of its own"):
        demo(output_dir=str(tmp_path), preset="cifar10")
