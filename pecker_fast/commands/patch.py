"""``pecker-fast patch``: one action each to make, inspect, verify, apply, revert, compare and export patch files."""

import sys
from collections.abc import Callable, Sequence

from ..parsing import HELP, HELP_ALL, parse_call
from ..runs import patch_actions

# Action to the option that is given by its place, and its summary.
ACTIONS = {
    "make": ("models", "RUN, or BASE RESULT: write what a run changed."),
    "inspect": ("file", "FILE: its metadata, hashes, and the density of each tensor."),
    "verify": ("file", "FILE: whether it is whole and fits a model."),
    "apply": ("files", "FILE ...: apply to a model on disk."),
    "revert": ("files", "FILE ...: revert, the last one first."),
    "diff": ("items", "A B: compare two networks or two patches."),
    "export": ("files", "FILE ...: the patched network as one file, or as an adapter of PEFT."),
}


def parse(words: Sequence[str]) -> Callable[[], None]:
    action = next(iter(words), None)
    if action in (*HELP, *HELP_ALL):
        print(overview())
        raise SystemExit(0)
    if action not in ACTIONS:
        what = "no action is given" if action is None else f"there is no action {action!r}"
        print(
            f"pecker-fast: {what}, expected one of {', '.join(ACTIONS)} (see pecker-fast patch --help)", file=sys.stderr
        )
        raise SystemExit(2)
    function, positional = getattr(patch_actions, action), ACTIONS[action][0]
    call = parse_call(function, words[1:], f"patch {action}", positional=positional)
    return lambda: print(call())


def overview() -> str:
    """The help of ``pecker-fast patch`` itself."""
    rows = [f"  {name:<10}{summary}" for name, (_, summary) in ACTIONS.items()]
    return "\n".join(
        [
            "usage: pecker-fast patch ACTION ... [OPTIONS]",
            "",
            "A patch file is what a run changed, bit for bit. Whoever has it and the result can undo the forgetting.",
            "",
            "actions:",
            *rows,
            "",
            "pecker-fast patch ACTION --help shows the options of an action.",
        ]
    )
