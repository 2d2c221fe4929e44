"""``pecker-fast robustness``."""

from collections.abc import Callable, Sequence

from ..figures import describe
from ..parsing import REQUIRED, parse_options
from ..runs.recorded import options_of_record
from ..runs.robustness import RobustnessArguments, robustness

DESCRIPTION = """Does it stay forgotten? Relearning, latent search, neighbouring classes, guidance and other samplers.
Writes robustness.json, robustness.md, robustness.html and robustness.png into the folder of the run, and the main
figures into its metrics.json; of several runs, or of a comparison, also a report with intervals over the seeds. It
leads with what it costs to bring the class back, beside a relabelled network and one that never saw the class
(--controls).
Real images are needed: the adversary of the relearning test has some."""

EXAMPLES = (
    "runs/digits-pecker-seed0",
    "runs/digits-pecker-seed0 --tests relearn,latent --relearn_images 4",
    "runs/compare-digits --controls",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    default = RobustnessArguments(run=REQUIRED)
    places = {"run": "RUN"}
    args = parse_options(
        default, words, "robustness", DESCRIPTION, positional=places, config=options_of_record, examples=EXAMPLES
    )
    return lambda: run(args)


def run(args: RobustnessArguments) -> None:
    """Attack, and print the verdicts and the main figures."""
    result = robustness(args)
    print("\n".join([*result.verdicts, *filter(None, [describe(result.figures)]), f"report: {result.report}"]))
