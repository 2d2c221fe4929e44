"""Options that no method has any more, so that runs from before stay the runs they were."""

from collections.abc import Mapping
from typing import Any

# Name and old default: what a run recorded that did not set the option.
RETIRED_OPTIONS = {"granularity": "entry"}


def without_retired(record: Mapping[str, Any]) -> dict[str, Any]:
    """Drop retired options from a record of a run, so that it compares equal to what the same run records today.

    Parameters
    ----------
    record : Mapping
        A checkpoint's fingerprint or a run's config.json.

    Returns
    -------
    dict
        The record without those entries of ``record["options"]`` that are retired and have their old default. A retired
        option with another value stays: that run computed something that no run computes today.
    """
    options = record.get("options")
    if not isinstance(options, Mapping):
        return dict(record)
    current = {
        name: value for name, value in options.items() if name not in RETIRED_OPTIONS or value != RETIRED_OPTIONS[name]
    }
    return {**record, "options": current}
