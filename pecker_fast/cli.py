"""The command line: ``pecker-fast demo | env | bench``. Imports everything, is imported by nothing."""

import json as json_module
import sys

import tyro

from .demo import demo
from .environment import describe_environment, environment


def env(json: bool = False) -> None:
    """Prints versions, devices and back ends, and why one is missing.

    Args:
        json: As JSON.
    """
    found = environment()
    print(json_module.dumps(found, indent=1) if json else describe_environment(found))


COMMANDS = {"demo": demo, "env": env}


def main(arguments: list[str] | None = None) -> None:
    """Runs a subcommand. Wrong input ends with one line on stderr and exit status 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="pecker-fast", description="Saliency masks and masked Adam.", args=arguments
        )
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"pecker-fast: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
