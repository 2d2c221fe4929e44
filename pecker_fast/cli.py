"""The command line, ``pecker-fast``. Imports everything, is imported by nothing.

``unlearn`` and ``pretrain`` are typed configurations: preset and method are read first, since they settle which options
there are and their defaults; every field is then an option.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json as json_module
import os
import sys
from collections.abc import Callable

import tyro

from .benchmarks import report, run
from .benchmarks.registry import OPS
from .environment import describe_environment, environment
from .runs.audit import report as audit_report
from .runs.compare import compare
from .runs.compare_concepts import compare_concepts
from .runs.convert import convert
from .runs.delta import delta
from .runs.demo import demo
from .runs.evaluate import evaluate
from .runs.evaluate_concept import evaluate_concept
from .runs.fisher import fisher_arguments, run_fisher
from .runs.pretrain import PretrainArguments, run_pretrain
from .runs.robustness import robustness
from .runs.sample import mask, sample
from .runs.sequence import sequence
from .runs.train_classifier import train_classifier
from .runs.unlearn import UnlearnArguments, run_unlearn
from .runs.unlearn_text import UnlearnTextArguments, run_unlearn_text
from .training.text_presets import TEXT_PRESETS


def env(json: bool = False) -> None:
    """Prints versions, devices and back ends, and why one is missing.

    Args:
        json: As JSON.
    """
    found = environment()
    print(json_module.dumps(found, indent=1) if json else describe_environment(found))


def bench(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    size: tuple[str, ...] = ("cifar10",),
    dtype: tuple[str, ...] = ("float32",),
    threads: tuple[int, ...] = (1, 2),
    device: str = "cpu",
    backend: str | None = None,
    repeats: int = 30,
    max_seconds: float = 20.0,
    json: str | None = None,
    list: bool = False,
) -> None:
    """Times the operations against named rivals, prints a table and says which bars are met.

    Args:
        names: Operations to run; all of them when none is named.
        size: Networks whose parameter shapes are used: tiny, small, cifar10, stl10, sd15, sdxl.
        dtype: Of parameters and gradients: float32, bfloat16, float16.
        threads: Numbers of CPU threads.
        device: cpu or cuda.
        backend: cuda, triton, cpu or reference; the best one for the device when not given.
        repeats: Rounds for each row.
        max_seconds: Time to spend on a row; at least three rounds are run.
        json: File to write the results to.
        list: Only print the names of the operations.
    """
    if list:
        print("\n".join(f"{name:<26}{op.description}" for name, op in OPS.items()))
        return
    if json is not None and not os.path.isdir(os.path.dirname(json) or "."):
        raise ValueError(f"json is {json!r}, but there is no folder {os.path.dirname(json)!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1: Triton's times are its interpreter's", file=sys.stderr)

    def progress(row) -> None:
        print(f"{row['figure']}: {report.cells(row)[4]}", file=sys.stderr)

    results = run.run(
        names,
        sizes=size,
        dtypes=dtype,
        threads=threads,
        device=device,
        backend=backend,
        repeats=repeats,
        max_seconds=max_seconds,
        progress=progress,
    )
    print(report.describe_conditions(results["conditions"]))
    print(report.text_table(results["rows"]))
    if json is not None:
        run.save(results, json)


def unlearn() -> None:
    """Makes a pretrained network forget classes, --preset digits|digits16|cifar10|stl10, --method pecker|pecker+|sfd|
    retrain|salun|selective_amnesia|esd, or a Stable Diffusion a concept, --preset sd15-celebrity|sd15-nudity, --method
    pecker|pecker+|sfd|selective_amnesia|esd."""


def fisher() -> None:
    """Computes the Fisher information of a Stable Diffusion, on images that it draws of what is to stay, for
    unlearn --method selective_amnesia --fisher FILE: --preset sd15-celebrity|sd15-nudity."""


def pretrain() -> None:
    """Trains the network that unlearning starts from: --preset digits|digits16|cifar10|stl10."""


COMMANDS = {
    "demo": demo,
    "unlearn": unlearn,
    "compare": compare,
    "evaluate": evaluate,
    "evaluate-concept": evaluate_concept,
    "robustness": robustness,
    "sequence": sequence,
    "report": audit_report,
    "pretrain": pretrain,
    "fisher": fisher,
    "sample": sample,
    "convert": convert,
    "delta": delta,
    "mask": mask,
    "train-classifier": train_classifier,
    "env": env,
    "bench": bench,
}


def _parse_unlearn(arguments: list[str]) -> Callable[[], None]:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="digits")
    early.add_argument("--method", default="pecker")
    known, rest = early.parse_known_args(arguments)
    text = known.preset in TEXT_PRESETS
    base, command = (UnlearnTextArguments, run_unlearn_text) if text else (UnlearnArguments, run_unlearn)
    default = base.defaults(known.preset, known.method)
    return functools.partial(command, _parse_method(default, "unlearn", unlearn.__doc__, rest))


def _parse_method(default, name: str, description: str | None, arguments: list[str]):
    # The options' type is the method's own.
    options = ("options", type(default.options), dataclasses.field(default=default.options))
    kind = dataclasses.make_dataclass(type(default).__name__, [options], bases=(type(default),), frozen=True)
    values = {item.name: getattr(default, item.name) for item in dataclasses.fields(default)}
    return _parse_dataclass(kind, kind(**values), name, description, arguments)


def _parse_fisher(arguments: list[str]) -> Callable[[], None]:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="sd15-celebrity")
    known, rest = early.parse_known_args(arguments)
    default = fisher_arguments(known.preset)
    return functools.partial(run_fisher, _parse_method(default, "fisher", fisher.__doc__, rest))


def _parse_pretrain(arguments: list[str]) -> Callable[[], None]:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="digits")
    known, rest = early.parse_known_args(arguments)
    default = PretrainArguments.defaults(known.preset)
    return functools.partial(
        run_pretrain, _parse_dataclass(PretrainArguments, default, "pretrain", pretrain.__doc__, rest)
    )


def _parse_dataclass(kind: type, default, name: str, description: str | None, arguments: list[str]):
    return tyro.cli(
        kind,
        default=default,
        prog=f"pecker-fast {name}",
        description=description,
        args=arguments,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _parse_compare(arguments: list[str]) -> Callable[[], None]:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    text = early.parse_known_args(arguments)[0].preset in TEXT_PRESETS
    return tyro.cli(_bound(compare_concepts if text else compare), prog="pecker-fast compare", args=arguments)


CONFIGURED = {
    "unlearn": _parse_unlearn,
    "pretrain": _parse_pretrain,
    "fisher": _parse_fisher,
    "compare": _parse_compare,
}


def _bound(command: Callable) -> Callable:
    """``command`` with its signature, but it only returns the call: parsing and running fail in different ways."""

    @functools.wraps(command)
    def bind(*args, **kwargs) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    return bind


def _one_line(text: str) -> str:
    """What tyro says about wrong arguments: the first section of its box, without the box."""
    said = []
    for line in text.splitlines():
        inner = line.strip().strip("│").strip()
        if inner and not inner.strip("─"):
            break
        if inner and not inner.startswith(("╭", "╰")):
            said.append(inner)
    return " ".join(said) or "wrong arguments"


def _parse(arguments: list[str] | None):
    """The command to run, with its arguments. Exits with one line and status 2 where they make no sense."""
    said = io.StringIO()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with contextlib.redirect_stderr(said):
            if arguments and arguments[0] in CONFIGURED:
                return CONFIGURED[arguments[0]](arguments[1:])
            return tyro.extras.subcommand_cli_from_dict(
                {name: _bound(command) for name, command in COMMANDS.items()},
                prog="pecker-fast",
                description="Unlearning in diffusion models, fast.",
                args=arguments,
            )
    except SystemExit as stop:
        if stop.code == 2:
            print(f"pecker-fast: {_one_line(said.getvalue())} (see pecker-fast --help)", file=sys.stderr)
        raise


def main(arguments: list[str] | None = None) -> None:
    """Runs a subcommand. Wrong input ends with one line on stderr and exit status 2."""
    try:
        _parse(arguments)()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"pecker-fast: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
