"""``pecker-fast robustness``. The kind of the run decides which options there are."""

from collections.abc import Callable, Sequence

from ..figures import describe
from ..names import option_names
from ..parsing import REQUIRED, parse_options
from ..runs.arguments import option_groups
from ..runs.evaluate import evaluation_class
from ..runs.recorded import options_of_record
from ..runs.robustness import Attacked, RobustnessArguments, robustness

DESCRIPTION = """Does it stay forgotten? Relearning, latent search, neighbouring classes, guidance and other samplers.
Writes robustness.json, robustness.md, robustness.html and robustness.png into the folder of the run, and the main
figures into its metrics.json; of several runs, or of a comparison, also a report with intervals over the seeds. It
leads with what it costs to bring the class back, beside a relabelled network and one that never saw the class
(--controls).
Real images are needed: the adversary of the relearning test has some. A run on a text-to-image model has other options:
robustness RUN --help."""

OF_PROMPTS = """Does it stay forgotten? Relearning by fine-tuning, and concept inversion: a word whose embedding is
learned. Writes robustness.json, robustness.md, robustness.html and robustness.png into the folder of the run, and the
main figures into its metrics.json. It leads with what it costs to bring the concept back, beside the network that the
run started from, edited in closed form. An interrupted command continues after the last complete attack."""

EXAMPLES = (
    "runs/digits-pecker-seed0",
    "runs/digits-pecker-seed0 --tests relearn,latent --relearn_images 4",
    "runs/compare-digits --controls",
    "runs/sd15-celebrity-pecker-seed0 --clip CLIP_FOLDER --attacks inversion",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    # It brings libraries that take a while.
    from ..runs.prompts.robustness import attack_prompts
    from ..runs.prompts.robustness_arguments import PromptRobustnessArguments

    kinds = [kind(run=REQUIRED) for kind in (PromptRobustnessArguments, RobustnessArguments)]
    own = option_groups(kinds[0]).keys() - option_groups(kinds[1]).keys()
    paths = [word for word in words if not word.startswith("-")]
    of_prompts = evaluation_class(paths).key == "concept" or bool(own & option_names(words))
    args = parse_options(
        kinds[0] if of_prompts else kinds[1],
        words,
        "robustness",
        OF_PROMPTS if of_prompts else DESCRIPTION,
        positional={"run": "RUN"},
        config=options_of_record,
        examples=EXAMPLES,
    )
    return lambda: run(attack_prompts(args) if of_prompts else robustness(args))


def run(result: Attacked) -> None:
    """Print the verdicts and the main figures."""
    print("\n".join([*result.verdicts, *filter(None, [describe(result.figures)]), f"report: {result.report}"]))
