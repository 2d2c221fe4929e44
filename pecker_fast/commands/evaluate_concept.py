"""``pecker-fast evaluate-concept``: ``evaluate`` for text-to-image models."""

from collections.abc import Callable, Sequence

from ..parsing import parse_options
from ..runs.arguments import option_groups
from ..runs.evaluate import evaluate
from ..runs.prompts.evaluation import PromptEvaluation

DESCRIPTION = """Measure how well a text-to-image model has forgotten a concept, and what it has kept. Images are drawn
once for a model, sampler, list of prompts and seeds, and cached in evaluation/ beside the result: an interrupted
evaluation continues. You provide the detectors: nothing is downloaded."""

# The options that only --help_all shows.
EXPERT = {"face_detector", "nudenet_min_prob", "nudenet_model", "nudenet_resolution", "sample_seed", "dtype"}


def parse(words: Sequence[str]) -> Callable[[], None]:
    default, aliases = PromptEvaluation(), {"preset": "--preset_name"}
    basic = option_groups(default).keys() - EXPERT
    args = parse_options(
        default, words, "evaluate-concept", DESCRIPTION, basic=basic, positional="run", aliases=aliases
    )
    return lambda: run(args)


def run(args: PromptEvaluation) -> None:
    """Measure, and print the figures."""
    measured = evaluate(args)
    print(f"{measured.table}\nresult: {measured.path}")
