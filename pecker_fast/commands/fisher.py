"""``pecker-fast fisher``. The preset decides the defaults."""

from collections.abc import Callable, Sequence

from ..parsing import early_option, parse_options
from ..runs.arguments import UnlearnArguments
from ..runs.fisher import FisherTask, fisher, fisher_arguments
from ..runs.recorded import options_of_record
from ..runs.unlearn import describe

DESCRIPTION = """Compute the Fisher information of a Stable Diffusion on images that it draws of prompts to keep, for
unlearn --method selective_amnesia --fisher FILE: --preset sd15-celebrity|sd15-nudity|sdxl-celebrity|sdxl-nudity."""
TITLES = {"options": "training"}
# The options that --help shows.
BASIC = (
    *("preset", "pretrained_model_name_or_path", "retain_prompts", "resolution", "replay_images", "replay_steps"),
    *("replay_batch_size", "fisher_timesteps", "fisher_chunks", "fisher_batch_size", "loss_reduction", "seed"),
    *("device", "mixed_precision", "teacher_dtype", "checkpointing_steps", "resume_from_checkpoint", "output_dir"),
    *("overwrite_output_dir", "dry_run"),
)

EXAMPLES = ("--pretrained_model_name_or_path SD15_FOLDER", "--preset sd15-nudity --dry_run")


def parse(words: Sequence[str]) -> Callable[[], None]:
    default = fisher_arguments(early_option(words, "preset") or "sd15-celebrity")
    args = parse_options(
        default, words, "fisher", DESCRIPTION, basic=BASIC, titles=TITLES, config=options_of_record, examples=EXAMPLES
    )
    return lambda: run(args)


def run(args: UnlearnArguments) -> None:
    """Print the configuration, or make the file and print its path."""
    if args.output.dry_run:
        print(describe(args, FisherTask))
        return
    path = fisher(args)
    if path is not None:
        print(f"Fisher information: {path}")
