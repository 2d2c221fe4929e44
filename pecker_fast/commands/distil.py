"""``pecker-fast distil``. The preset decides which other options there are, and their defaults."""

from collections.abc import Callable, Sequence
from functools import partial

from ..figures import describe as figure_lines
from ..parallel import process_number
from ..parsing import early_option, parse_options
from ..runs.arguments import UnlearnArguments
from ..runs.distilled import distil_arguments
from ..runs.recorded import options_of_record
from ..runs.remembered import preset_from
from ..runs.unlearn import describe, distil

DESCRIPTION = """Distil a pretrained network into a one-step generator of all classes or prompts, and its score network,
for unlearn --distilled FOLDER: once for many requests. --preset
digits|digits16|mnist|images|cifar10|stl10|sd15-celebrity|sd15-nudity|sdxl-celebrity|sdxl-nudity."""
TITLES = {"options": "training"}
# The options that --help shows.
BASIC = (
    *("preset", "max_train_steps", "train_batch_size", "t_init", "score_learning_rate", "generator_learning_rate"),
    *("lr_scheduler", "ema_decay", "pretrained_model_name_or_path", "retain_prompts", "save_dtype", "judge"),
    *("samples_per_class", "dataset_name", "data_root", "download", "weights_dtype", "fsdp", "seed", "device"),
    *("mixed_precision", "profile", "checkpointing_steps", "validation_steps", "resume_from_checkpoint"),
    *("output_dir", "overwrite_output_dir", "dry_run"),
)
FIGURES = ("retain_accuracy", "worst_retained_accuracy", "frechet_distance", "frechet_real_split", "seconds")

EXAMPLES = (
    "--preset digits --output_dir runs/distilled",
    "--preset cifar10 --pretrained_model_name_or_path NETWORK --dry_run",
    "--config runs/distilled/config.json --seed 1 --output_dir runs/distilled-1",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    default = distil_arguments(preset_from(partial(early_option, words)))
    args = parse_options(
        default, words, "distil", DESCRIPTION, basic=BASIC, titles=TITLES, config=options_of_record, examples=EXAMPLES
    )
    return lambda: run(args)


def run(args: UnlearnArguments) -> None:
    """Print the configuration, or make the run and print its main figures."""
    if args.output.dry_run:
        text = describe(args)
        if process_number() == 0:
            print(text)
        return
    metrics = distil(args).metrics
    if metrics:
        print(figure_lines({name: metrics[name] for name in FIGURES if name in metrics}))
        print(f"report: {args.folder / 'report.md'}\nto unlearn: --distilled {args.folder}")
