"""Options that came or went, so that runs from before stay the runs they were."""

from collections.abc import Mapping
from typing import Any

# No method has them any more. Name and old default: what a run recorded that did not set the option.
RETIRED_OPTIONS = {"granularity": "entry"}
# Runs from before they existed recorded nothing. Name and the value with which a run computes what those computed.
ADDED_OPTIONS: dict[str, Any] = {
    "random_shift": 0,
    "destroy": None,
    "destroy_share": 0.1,
    "destroy_strength": 0.5,
    "destroy_score": "ratio",
    "destroy_within": "mask",
    "destroy_dense": False,
    "relabel": False,
}


def without_retired(record: Mapping[str, Any]) -> dict[str, Any]:
    """Drop options that came or went from a record of a run, so that the records of one run by different versions are
    equal.

    Parameters
    ----------
    record : Mapping
        A checkpoint's fingerprint or a run's config.json.

    Returns
    -------
    dict
        The record without those entries of ``record["options"]`` that are retired or were added and have the value
        named above. An option with another value stays: that run computed something else.
    """
    options = record.get("options")
    if not isinstance(options, Mapping):
        return dict(record)
    implied = RETIRED_OPTIONS | ADDED_OPTIONS
    current = {name: value for name, value in options.items() if name not in implied or value != implied[name]}
    return {**record, "options": current}
