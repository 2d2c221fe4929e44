"""Parts of models are loaded from folders alone: nothing in a file sends us to a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..records import MAX_BYTES, RecordError, parse_object, read_object

# What libraries read as a configuration. diffusers takes a text in place of an object for a name on the hub.
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "model_index.json")
TOKENIZER = "tokenizer_config.json"
# What transformers writes there as the length of a tokenizer without one: 1e30, which no other number may be.
NO_LENGTH = b"1000000000000000019884624838656"
FIX = "download or copy the folder again"


@contextmanager
def offline() -> Iterator[None]:
    """A context in which the client of the hub sends no requests, whatever a library asks of it."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def check_configs(folder: Path) -> None:
    """Raise RecordError unless every configuration in a folder and in the folders of its parts is an object."""
    for place in (folder, *(entry for entry in sorted(folder.iterdir()) if entry.is_dir())):
        for name in CONFIGS:
            if (place / name).is_file():
                _check_config(place / name)


def read_config(path: Path, record: Any = None) -> dict[str, Any]:
    """The configuration of a part of a model. RecordError if it is missing or damaged."""
    return read_object(path, record, fix=FIX)


def _check_config(path: Path) -> None:
    if path.name == TOKENIZER and path.stat().st_size <= MAX_BYTES:
        parse_object(path.read_bytes().replace(NO_LENGTH, b"0"), None, str(path), fix=FIX)
    else:
        read_object(path, fix=FIX)


@contextmanager
def loading(folder: Path, what: str) -> Iterator[None]:
    """A context in which a library loads ``what`` from a folder, offline. Errors become a ValueError of one line."""
    check_configs(folder)
    with offline():
        try:
            yield
        except RecordError:
            raise
        except Exception as error:
            if "size mismatch" in str(error):
                raise ValueError(f"{folder} has weights that do not fit its configuration: {reason(error)}") from error
            # For damaged files the libraries raise almost anything.
            raise ValueError(f"{folder} has no {what} that can be read: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The reason of an error in one line of at most 300 characters: of several lines the first that says one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith("size mismatch")]
    text = wrong[0] if wrong else next(iter(lines), type(error).__name__)
    text += f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return text if len(text) <= 300 else f"{text[:297]}..."
