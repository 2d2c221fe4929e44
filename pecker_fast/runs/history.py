"""When a run was started, resumed and ended, by which command and which code: history.jsonl in its folder.

It identifies no run: checkpoints do not depend on it, and folders of earlier versions lack it.
"""

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..environment import code_facts
from ..files import append_line

HISTORY = "history.jsonl"


def started_words(command: Sequence[str]) -> list[str]:
    """Words of the command that this process was started with, without the program, if it is the subcommand of
    ``command``; otherwise (from Python, or by another subcommand) those of ``command``."""
    words = sys.argv[1:]
    return words if words[:1] == list(command[:1]) else list(command)


def record_event(
    folder: Path, event: Literal["started", "resumed", "ended"], step: int, command: Sequence[str] = ()
) -> None:
    """Append a line to history.jsonl.

    Parameters
    ----------
    folder : Path
        Of the run.
    event : {"started", "resumed", "ended"}
        What happens now.
    step : int
        Iterations that have been done.
    command : sequence of str
        Words of the command line, without the program. "ended" has none.
    """
    record: dict[str, Any] = {
        "event": event,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        **({"command": ["pecker-fast", *command]} if command else {}),
        **code_facts(),
    }
    append_line(folder / HISTORY, record)
