"""The command line, ``pecker-fast``. Imports a subcommand when it is called; nothing imports this module.

It runs before torch is loaded, which takes seconds: see ``pecker_fast/__init__.py``.
"""

import contextlib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import IO, Any

from . import __version__
from .names import nearest, running_with

# Subcommand to its summary. commands/<name>.py has it, with "_" for "-".
COMMANDS = {
    "demo": "Forget a handwritten digit by several methods, measure it and write a report.",
    "unlearn": "Make a pretrained network forget classes, or a Stable Diffusion a concept.",
    "compare": "Run several methods over several seeds, and tabulate means and spreads.",
    "evaluate": "Measure a run or a network.",
    "evaluate-concept": "The same, for text-to-image models.",
    "robustness": "Attack a run: how much it takes to bring back what was forgotten.",
    "sequence": "Forget classes one request after the other.",
    "report": "Write the report of a run, a comparison, a sequence or a demo again.",
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
_EXAMPLES = ("demo", "unlearn --preset digits --method patch --forget_classes 0", "report runs/digits-patch-seed0")
# How OpenMP's threads wait: the standard's variable, GNU's (that of torch's wheels) and Intel's.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Colours and other control sequences of a terminal, and characters that draw boxes.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|[\u2500-\u257f]")


def overview() -> str:
    """The help of ``pecker-fast`` itself."""
    return "\n".join(
        [
            "usage: pecker-fast COMMAND [OPTIONS]",
            "",
            "Unlearning in diffusion models, fast.",
            "",
            "commands:",
            *(f"  {name:<18}{summary}" for name, summary in COMMANDS.items()),
            "",
            "pecker-fast COMMAND --help shows the options of a command, pecker-fast --version the version.",
            "",
            "examples:",
            *(f"  pecker-fast {example}" for example in _EXAMPLES),
        ]
    )


def _spin_briefly() -> None:
    """Let OpenMP's idle threads spin for a short time before they sleep, unless the user has said how they wait.

    Usually they spin for milliseconds. If another process is busy on their cores, they take the time of the thread that
    they wait for. Not spinning at all (OMP_WAIT_POLICY=passive) costs small networks far more than a short spin does,
    because each operation of theirs takes less than a thread takes to wake. OpenMP reads the variable when torch is
    loaded.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = "1000"


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
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # It was closed (>&-). The null device also takes the place of the descriptor, before another file does.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 -- for the whole process
    for stream in (sys.stdout, sys.stderr):
        # Names of classes and files may have characters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            _main(words)
        finally:
            # Fails here, and not at the exit of Python, if the reader of a pipe has gone.
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads, such as head, has enough. Python would complain at its exit if it could not flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _main(words: list[str]) -> None:
    if words[:1] in (["--help"], ["-h"], ["--help_all"], ["--help-all"]):
        print(overview())
        raise SystemExit(0)
    if words[:1] == ["--version"]:
        print(f"pecker-fast {__version__}")
        return
    if not words or words[0] not in COMMANDS:
        what = f"there is no command {words[0]!r}" if words else "no command is given"
        near = nearest(words[0], COMMANDS) if words else ""
        _fail("pecker-fast", f"{what}, expected one of {', '.join(COMMANDS)}{near} (see pecker-fast --help)")
    name = f"pecker-fast {words[0]}"
    if words[0] != "bench":
        # Its times are those of a library.
        _spin_briefly()
    with _notice(f"{name}: loading ..."):
        _run(name, words)


def _run(name: str, words: list[str]) -> None:
    """Run the subcommand; a failure is one line."""
    parsed = False
    try:
        with _quick_exit():
            command = importlib.import_module(f".commands.{words[0].replace('-', '_')}", __package__)
            action = command.parse(words[1:])
        parsed = True
        with running_with(words[1:]):
            action()
    except ModuleNotFoundError as error:
        _fail(name, f"{error}: pip install 'pecker-fast[train]'", error)
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        first = str(error).partition(" ")[0]
        typed = any(word.partition("=")[0].replace("-", "_") == f"__{first}" for word in words)
        hint = f" (see pecker-fast {getattr(error, 'command', None) or words[0]} --help)"
        _fail(name, f"{error}{hint}" if typed or not parsed else str(error), error)


def _fail(name: str, message: str, cause: BaseException | None = None) -> None:
    """End with status 2 after one line without colours, boxes and control characters."""
    print(f"{name}: {' '.join(_CONTROL.sub('', message).split())}", file=sys.stderr)
    raise SystemExit(2) from cause


@contextlib.contextmanager
def _quick_exit() -> Iterator[None]:
    """Ctrl-C ends the process at once: libraries that are being loaded would turn it into errors of their own."""
    try:
        before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    except ValueError:
        # Not the main thread, whose handler stays.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Clearing:
    """A stream of a terminal whose first output takes the place of a notice."""

    def __init__(self, stream: IO[str], clear: Any) -> None:
        self._stream, self._clear = stream, clear

    def write(self, text: str) -> int:
        self._clear()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _notice(text: str) -> Iterator[None]:
    """Show a line on a terminal until there is other output."""
    if not sys.stderr.isatty():
        yield
        return
    stream, shown = sys.stderr, [True]

    def clear() -> None:
        if shown:
            shown.clear()
            # Blanks in place of a control sequence, which not every terminal has.
            stream.write(f"\r{' ' * len(text)}\r")
            stream.flush()

    stream.write(text)
    stream.flush()
    outputs: Any = (_Clearing(sys.stdout, clear), _Clearing(stream, clear))
    with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
        try:
            yield
        finally:
            clear()
