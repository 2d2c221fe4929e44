"""``pecker-fast patch``: one action each to make, inspect, verify, apply, revert, compare and export patch files."""

from collections.abc import Callable, Sequence

from ..names import nearest
from ..parsing import HELP, HELP_ALL, UsageError, parse_call
from ..runs import patch_actions

# Action to the option that is given by its place, what the help calls it, a summary, and an example.
ACTIONS = {
    "make": ("models", "RUN", "RUN, or BASE RESULT: write what a run changed.", "runs/a --output patch.safetensors"),
    "inspect": ("file", "FILE", "FILE: its metadata, hashes, and the density of each tensor.", "patch.safetensors"),
    "verify": ("file", "FILE", "FILE: whether it is whole and fits a model.", "patch.safetensors --model MODEL"),
    "apply": ("files", "FILE", "FILE ...: apply to a model on disk.", "patch.safetensors --model MODEL --output NEW"),
    "revert": ("files", "FILE", "FILE ...: revert, the last one first.", "patch.safetensors --model NEW --in_place"),
    "diff": ("items", "ITEM", "A B: compare two networks or two patches.", "a.safetensors b.safetensors"),
    "export": (
        "files",
        "FILE",
        "FILE ...: the patched network as one file, or as an adapter of PEFT.",
        "patch.safetensors --model MODEL --output patched.safetensors",
    ),
}


def parse(words: Sequence[str]) -> Callable[[], None]:
    action = next(iter(words), None)
    if action in (*HELP, *HELP_ALL):
        print(overview())
        raise SystemExit(0)
    if action not in ACTIONS:
        what = "no action is given" if action is None else f"there is no action {action!r}"
        raise UsageError(f"{what}, expected one of {', '.join(ACTIONS)}{nearest(action, ACTIONS)}")
    name, place, _, example = ACTIONS[action]
    function = getattr(patch_actions, action)
    call = parse_call(function, words[1:], f"patch {action}", positional={name: place}, examples=(example,))
    return lambda: print(call())


def overview() -> str:
    """The help of ``pecker-fast patch`` itself."""
    rows = [f"  {name:<10}{summary}" for name, (*_, summary, _) in ACTIONS.items()]
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
            "",
            "examples:",
            *(f"  pecker-fast patch {name} {example}" for name, (*_, example) in ACTIONS.items()),
        ]
    )
