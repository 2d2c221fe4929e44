"""``pecker-fast robustness``."""

from collections.abc import Callable, Sequence

import tyro

from ..figures import describe
from ..parsing import parse_options
from ..runs.robustness import RobustnessArguments, robustness

DESCRIPTION = """Does it stay forgotten? Relearning, latent search, neighbouring classes, guidance and other samplers.
Writes robustness.json, robustness.md, robustness.html and robustness.png into the folder of the run, and the main
figures into its metrics.json. Real images are needed: the adversary of the relearning test has some."""


def parse(words: Sequence[str]) -> Callable[[], None]:
    default = RobustnessArguments(run=tyro.MISSING)
    args = parse_options(default, words, "robustness", DESCRIPTION, positional="run")
    return lambda: run(args)


def run(args: RobustnessArguments) -> None:
    """Attack, and print the main figures."""
    result = robustness(args)
    print(f"{describe(result.figures)}\nreport: {result.report}")
