"""``pecker-fast compare``. The preset decides which options there are: methods that forget classes, or prompts."""

from collections.abc import Callable, Sequence
from functools import partial

from ..parsing import early_option, parse_options
from ..runs.arguments import option_groups, with_options
from ..runs.compare import CompareArguments, compare, comparison_class
from ..runs.recorded import options_of_record
from ..runs.remembered import preset_from

DESCRIPTION = """Run methods over seeds, and write a table with means and spreads, curves, and the figures of each run;
for a text-to-image model (--preset sd15-celebrity|sd15-nudity) as the published Table 3 does. The same command again
continues where it was interrupted: runs that have ended are read, not repeated."""

# The options that only --help_all shows.
EXPERT = {"face_detector", "nudenet_min_prob", "nudenet_model", "nudenet_resolution", "sample_seed", "dtype"}
EXPERT |= {"coco_captions", "coco_images", "first_seed", "final_samples_per_class"}

EXAMPLES = (
    "--methods pecker sfd relabel --seeds 3 --output_dir runs/three",
    "--preset digits --methods patch,sfd --set train_batch_size=24 --output_dir runs/batch-24",
    "--preset sd15-celebrity --methods sd,esd --pretrained_model_name_or_path SD15_FOLDER --output_dir runs/celebrity",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    preset = preset_from(partial(early_option, words))
    default = with_options(comparison_class(preset)(), {"preset": preset})
    basic = option_groups(default).keys() - EXPERT
    args = parse_options(
        default, words, "compare", DESCRIPTION, basic=basic, config=options_of_record, examples=EXAMPLES
    )
    return lambda: run(args)


def run(args: CompareArguments) -> None:
    """Compare, and print the table."""
    comparison = compare(args)
    print(f"{comparison.table}\nreport: {comparison.report}")
