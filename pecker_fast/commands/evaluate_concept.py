"""``pecker-fast evaluate-concept``: ``evaluate`` for text-to-image models."""

from collections.abc import Callable, Sequence

from ..parsing import parse_options
from ..runs.arguments import option_groups
from ..runs.evaluate import evaluate
from ..runs.prompts.evaluation import PromptEvaluation
from ..runs.recorded import options_of_record

DESCRIPTION = """Measure how well a text-to-image model has forgotten a concept, and what it has kept. Images are drawn
once for a model, sampler, list of prompts and seeds, and cached in evaluation/ beside the result: an interrupted
evaluation continues. You provide the detectors: nothing is downloaded."""

# The options that only --help_all shows.
EXPERT = {"face_detector", "nudenet_min_prob", "nudenet_model", "nudenet_resolution", "sample_seed", "dtype"}

EXAMPLES = (
    "runs/sd15-celebrity-pecker-seed0 --celebrity_detector CLASSIFIER --celebrity_labels NAMES",
    "SD15_FOLDER --task nudity --nudenet_model MODEL --images_per_prompt 2",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    default = PromptEvaluation()
    args = parse_options(
        default,
        words,
        "evaluate-concept",
        DESCRIPTION,
        basic=option_groups(default).keys() - EXPERT,
        positional={"run": "RUN"},
        aliases={"preset": "preset_name"},
        config=options_of_record,
        examples=EXAMPLES,
    )
    return lambda: run(args)


def run(args: PromptEvaluation) -> None:
    """Measure, and print the figures."""
    measured = evaluate(args)
    print(f"{measured.table}\nresult: {measured.path}")
