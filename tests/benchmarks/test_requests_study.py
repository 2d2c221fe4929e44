"""The study of requests one after the other: what it runs, that it resumes, and its table."""

import json

import pytest
from pecker_fast.benchmarks.studies import requests as study
from pecker_fast.benchmarks.studies.requests import RULES, arguments_of, main

from pecker_fast.runs import sequence as command
from pecker_fast.unlearning import method_class


def test_options_exist(tmp_path, monkeypatch):
    """Every rule's first request is planned, and all of its options are the method's."""
    planned = []

    def watched(args, before=None):
        planned.append(args)
        raise SystemExit(143)

    monkeypatch.setattr(command, "unlearn", watched)
    for i, rule in enumerate(RULES.values()):
        with pytest.raises(SystemExit):
            command.sequence(arguments_of(rule, 0, tmp_path / str(i)))
        args = planned[-1]
        assert isinstance(args.options, method_class(rule.method).Options)
        assert (args.options.train_batch_size, args.options.max_train_steps) == (24, 80)
        # All rules start from a distilled generator.
        assert args.request.distilled == "auto" or method_class(rule.method).needs_distilled
    assert planned[1].options.density == 0.05 and planned[3].options.generator_learning_rate == 6e-4


@pytest.mark.slow
def test_missing_sequences_are_made_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "CLASSES", (0, 3))
    monkeypatch.setattr(study, "SAMPLES_PER_CLASS", 2)
    short = ("train_batch_size=2", "forget_batch_size=2", "max_train_steps=2", "saliency_chunks=2")
    monkeypatch.setattr(study, "COMMON", short)
    words = ["--results", str(tmp_path), "--rules", "patch 0.1", "--seeds"]
    main([*words, "0"])
    (line,) = (tmp_path / "sequences.jsonl").read_text().splitlines()
    rows = json.loads(line)["rows"]
    assert [row["forget_classes"] for row in rows] == [[0], [0, 3], [0, 3]]
    assert all(row["patch_bytes"] > 0 and 0 < row["parameters_changed"] <= 10.01 for row in rows)
    main([*words, "0", "1"])
    output = capsys.readouterr().out
    assert "[1 of 1] patch 0.1, seed 1" in output
    lines = (tmp_path / "sequences.jsonl").read_text().splitlines()
    assert lines[0] == line and [json.loads(x)["seed"] for x in lines] == [0, 1]
    main(["--results", str(tmp_path), "--summary"])
    table = capsys.readouterr().out
    assert "| 1: forget 0 | 2 |" in table and "all at once" in table
    for wrong, message in (
        (["--rules", "sfd"], "rules has 'sfd', expected some of patch 0.1"),
        (["--summary", "--results", str(tmp_path / "none")], "has no sequences"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2 and message in capsys.readouterr().err
