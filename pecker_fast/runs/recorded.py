"""Options from a file: written by hand, or config.json of a run, which says how to make the run again."""

from collections.abc import Mapping
from typing import Any

from ..training.retired import RETIRED_OPTIONS

# Keys of a run's config.json that are no options: facts about it. Hashes end with HASH.
FACTS = ("num_processes", "training_images", "known_generator", "prompts", "task")
HASH = "_sha256"
# Groups of options in config.json.
GROUPS = ("options", "unet")
# Methods of config.json that have a command of their own.
COMMANDS = ("pretrain",)


def options_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a file, by name.

    Parameters
    ----------
    record : Mapping
        Options by name; or config.json of a run, of which everything that is no option is left out, as are the
        checkpoint that the run was resumed from, and its folder if it is the usual one.

    Returns
    -------
    dict
        Values by name, as JSON has them.
    """
    values: dict[str, Any] = {}
    for key, value in record.items():
        if key in GROUPS and isinstance(value, Mapping):
            values |= value
        else:
            values[key] = value
    if "num_processes" not in record:
        return values
    for name in [*FACTS, "resume_from_checkpoint", *(key for key in values if key.endswith(HASH))]:
        values.pop(name, None)
    if values.get("output_dir") == usual_folder(*map(values.get, ("preset", "method", "seed"))):
        # It follows from the other options, which the command line may change.
        del values["output_dir"]
    for name, usual in RETIRED_OPTIONS.items():
        if values.get(name) == usual:
            del values[name]
    if values.get("method") in COMMANDS:
        # Of these the names are the data's.
        for name in ("method", "class_names"):
            values.pop(name, None)
    if values.get("forget_classes") == []:
        # A distillation's: it has no such options.
        del values["forget_classes"], values["cover_class"]
    elif "cover_class" in values and values["cover_class"] is None:
        values["cover_class"] = "random"
    return values


def usual_folder(preset: Any, method: Any, seed: Any) -> str:
    """The folder of a run whose output_dir is not set."""
    return f"runs/{preset}-{method}-seed{seed}"
