"""Runs from before an option was retired keep their identity."""

import json

import pytest

from pecker_fast.runs.several import ended
from pecker_fast.runs.task import task_class, unlearn_arguments
from pecker_fast.training.retired import RETIRED_OPTIONS, without_retired


@pytest.mark.parametrize("record", [{"options": {"density": 0.5}}, {"method": "pretrain"}, {"options": None}, {}])
def test_records_without_retired_options_are_unchanged(record):
    assert without_retired(record) == record


def test_finished_run_with_a_retired_option_is_finished(tmp_path):
    args = unlearn_arguments("digits", "pecker", {"output_dir": str(tmp_path)})
    config = json.loads(json.dumps(task_class("digits").describe(args)))
    config["options"] |= RETIRED_OPTIONS
    # Recorded beside the options then, but no longer.
    config["stop_at_nonfinite"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not ended(args)
    (tmp_path / "metrics.json").write_text("{}")
    assert ended(args)
    config["options"]["granularity"] = "row"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has a run with another options"):
        ended(args)
