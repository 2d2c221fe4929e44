"""``pecker-fast evaluate``. What is measured decides which options there are."""

from collections.abc import Callable, Sequence

from ..names import option_names
from ..parsing import early_option, parse_options
from ..runs.evaluate import EvaluateArguments, evaluate, evaluation_class
from ..runs.recorded import options_of_record

DESCRIPTION = """Measure forgetting and image quality of a run, or of any network, and write evaluation.json. Samples
are drawn once for a network, sampler and seed, and cached in evaluation/ beside it: an interrupted evaluation
continues, and further measurements draw nothing. A text-to-image model, or a run on one, has other options: evaluate
RUN --help."""

EXAMPLES = (
    "runs/digits-pecker-seed0 --samples_per_class 1000",
    "runs/cifar10-pecker-seed0 --judge JUDGE --inception_weights WEIGHTS --data_root data",
    "--preset digits --forget_classes 0,3 --output before.json",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    preset = early_option(words, "preset") or early_option(words, "preset_name")
    kind = evaluation_class(paths_of(words), preset, option_names(words))
    args = parse_options(
        kind(),
        words,
        "evaluate",
        DESCRIPTION,
        positional={"run": "RUN"},
        aliases={"preset": "preset_name"},
        config=options_of_record,
        examples=EXAMPLES,
    )
    return lambda: run(args)


def paths_of(words: Sequence[str]) -> list[str]:
    """The words that may be what is measured."""
    return [word for word in words if not word.startswith("-")]


def run(args: EvaluateArguments) -> None:
    """Measure, and print the figures."""
    measured = evaluate(args)
    print(f"{measured.table}\nresult: {measured.path}")
