"""``pecker-fast env``."""

import json as json_module
from collections.abc import Callable, Sequence

from ..environment import describe_environment, environment
from ..parsing import parse_call


def parse(words: Sequence[str]) -> Callable[[], None]:
    return parse_call(env, words, "env", examples=("", "--json"))


def env(json: bool = False) -> None:
    """Print versions, devices and back ends, and why one is missing.

    Parameters
    ----------
    json
        Print JSON.
    """
    facts = environment()
    print(json_module.dumps(facts, indent=1) if json else describe_environment(facts))
