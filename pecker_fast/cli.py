"""The command line, ``pecker-fast``. Imports a subcommand when it is called; nothing imports this module."""

import importlib
import os
import sys

from . import __version__

# Subcommand to its summary. commands/<name>.py has it, with "_" for "-".
COMMANDS = {
    "demo": "Forget a handwritten digit by several methods, measure it and write a report.",
    "unlearn": "Make a pretrained network forget classes, or a Stable Diffusion a concept.",
    "compare": "Run several methods over several seeds, and tabulate means and spreads.",
    "evaluate": "Measure a run or a network.",
    "evaluate-concept": "The same, for text-to-image models.",
    "robustness": "Attack a run: how much it takes to bring back what was forgotten.",
    "sequence": "Forget classes one request after the other.",
    "report": "Write the report of a run again.",
    "distil": "Distil the network into a one-step generator, once for many requests.",
    "pretrain": "Train the network that unlearning starts from.",
    "fisher": "Compute the Fisher information of a Stable Diffusion, for selective_amnesia.",
    "sample": "Draw images of a network.",
    "convert": "Convert a pickled U-Net to safetensors.",
    "patch": "Make, inspect, verify, apply or revert a patch: what a run changed, as a file.",
    "mask": "Compute a mask, or show one.",
    "train-classifier": "Train the classifier that a preset's results are judged by.",
    "env": "Print versions, devices and back ends.",
    "bench": "Time the operations against baselines.",
}


def overview() -> str:
    """The help of ``pecker-fast`` itself."""
    rows = [f"  {name:<18}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pecker-fast COMMAND [OPTIONS]",
            "",
            "Unlearning in diffusion models, fast.",
            "",
            "commands:",
            *rows,
            "",
            "pecker-fast COMMAND --help shows the options of a command, pecker-fast --version the version.",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand.

    Parameters
    ----------
    arguments : list of str, optional
        Words of the command line. Default: those that the process was started with.

    Raises
    ------
    SystemExit
        With status 2 after one line on stderr if the input is wrong, 130 after Ctrl-C, 141 if the reader of a pipe has
        gone.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] in (["--help"], ["-h"]):
        print(overview())
        raise SystemExit(0)
    if words[:1] == ["--version"]:
        print(f"pecker-fast {__version__}")
        return
    if not words or words[0] not in COMMANDS:
        what = f"there is no command {words[0]!r}" if words else "no command is given"
        print(f"pecker-fast: {what}, expected one of {', '.join(COMMANDS)} (see pecker-fast --help)", file=sys.stderr)
        raise SystemExit(2)
    try:
        command = importlib.import_module(f".commands.{words[0].replace('-', '_')}", __package__)
        command.parse(words[1:])()
    except ModuleNotFoundError as error:
        print(f"pecker-fast: {error}: pip install 'pecker-fast[train]'", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenPipeError:
        # Whoever reads, such as head, has enough. Python would complain at its exit if it could not flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"pecker-fast: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
