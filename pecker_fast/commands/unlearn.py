"""``pecker-fast unlearn``. Preset and method decide which other options there are, and their defaults."""

from collections.abc import Callable, Sequence
from functools import partial

from ..figures import describe as figure_lines
from ..parallel import process_number
from ..parsing import early_option, parse_options
from ..runs.arguments import UnlearnArguments
from ..runs.recorded import options_of_record
from ..runs.remembered import preset_from
from ..runs.reports import caution_lines
from ..runs.task import unlearn_arguments
from ..runs.unlearn import describe, unlearn

DESCRIPTION = """Make a pretrained network forget classes, or a Stable Diffusion a concept (--preset sd15-celebrity|
sd15-nudity|sdxl-celebrity|sdxl-nudity). Methods: pecker, pecker+, patch, sfd, retrain, salun, selective_amnesia, esd,
relabel."""
TITLES = {"options": "training"}
# The options that --help shows.
BASIC = (
    *("preset", "method", "max_train_steps", "train_batch_size", "forget_batch_size", "density", "mask_refresh_steps"),
    *(
        "act_on",
        "score_learning_rate",
        "generator_learning_rate",
        "learning_rate",
        "generator_forget_weight",
        "retain_weight",
    ),
    *("ewc_weight", "negative_guidance", "pretrained_model_name_or_path", "forget_classes", "cover_class", "concept"),
    *(
        "cover",
        "distilled",
        "retain_prompts",
        "fisher",
        "judge",
        "samples_per_class",
        "dataset_name",
        "data_root",
        "download",
    ),
    *("weights_dtype", "fsdp", "seed", "device", "mixed_precision", "profile", "checkpointing_steps"),
    *("validation_steps", "resume_from_checkpoint", "output_dir", "overwrite_output_dir", "dry_run"),
)
FIGURES = ("ua", "retain_accuracy", "frechet_distance", "diversity", "seconds")

EXAMPLES = (
    "--preset digits --method patch --forget_classes 0 --cover_class 1",
    "--preset digits --forget_classes 0,3 --output_dir runs/mine",
    "--config runs/mine/config.json --seed 1 --output_dir runs/mine-1",
    "--preset sd15-celebrity --pretrained_model_name_or_path SD15_FOLDER --concept NAME --dry_run",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    default = unlearn_arguments(preset_from(partial(early_option, words)), early_option(words, "method") or "pecker")
    args = parse_options(
        default, words, "unlearn", DESCRIPTION, basic=BASIC, titles=TITLES, config=options_of_record, examples=EXAMPLES
    )
    return lambda: run(args)


def run(args: UnlearnArguments) -> None:
    """Print the configuration, or make the run and print its main figures."""
    if args.output.dry_run:
        text = describe(args)
        if process_number() == 0:
            print(text)
        return
    metrics = unlearn(args).metrics
    if metrics:
        print(figure_lines({name: metrics.get(name) for name in FIGURES}))
        print("\n".join([*caution_lines(metrics), f"report: {args.folder / 'report.md'}"]))
