"""Runs from before an option was retired are still the runs they were."""

import dataclasses
import json

import pytest

from pecker_fast.runs.several import ended
from pecker_fast.runs.unlearn import UnlearnArguments
from pecker_fast.training.retired import RETIRED_OPTIONS, without_retired


@pytest.mark.parametrize("record", [{"options": {"density": 0.5}}, {"method": "pretrain"}, {"options": None}, {}])
def test_records_without_retired_options_stay(record):
    assert without_retired(record) == record


def test_an_ended_run_with_a_retired_option_has_ended(tmp_path):
    args = UnlearnArguments.defaults("digits", "pecker")
    args = dataclasses.replace(args, request=dataclasses.replace(args.request, output_dir=str(tmp_path)))
    config = json.loads(json.dumps(args.describe()))
    config["options"] |= RETIRED_OPTIONS
    # What a run recorded beside its options, and no run records today.
    config["stop_at_nonfinite"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not ended(args)
    (tmp_path / "metrics.json").write_text("{}")
    assert ended(args)
    config["options"]["granularity"] = "row"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has a run with another options"):
        ended(args)
