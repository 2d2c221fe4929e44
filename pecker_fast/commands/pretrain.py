"""``pecker-fast pretrain``. The preset decides the defaults."""

import json
import sys
from collections.abc import Callable, Sequence

from ..parsing import early_option, parse_options
from ..runs.pretrain import PretrainArguments, pretrain
from ..runs.recorded import options_of_record
from ..runs.remembered import USUAL

DESCRIPTION = """Train the network that unlearning starts from: --preset digits|digits16|mnist|images|cifar10|stl10.
--preset images is for your own (--dataset_name folder:PATH), whose size, channels and classes decide the network."""
TITLES = {"options": "training", "unet": "network"}
# The options that --help shows.
BASIC = (
    *("preset", "max_train_steps", "train_batch_size", "learning_rate", "lr_scheduler", "ema_decay", "sample_size"),
    *("in_channels",),
    *(
        "num_classes",
        "random_shift",
        "block_out_channels",
        "layers_per_block",
        "samples_per_class",
        "judge",
        "evaluate",
        "seed",
        "device",
    ),
    *("mixed_precision", "save_dtype", "profile", "dataset_name", "data_root", "download", "checkpointing_steps"),
    *("validation_steps", "resume_from_checkpoint", "output_dir", "overwrite_output_dir", "dry_run"),
)

EXAMPLES = (
    "--preset digits --output_dir runs/digits",
    "--preset cifar10 --data_root data --download --checkpointing_steps 5000",
    "--preset cifar10 --dataset_name folder:PICTURES --num_classes 3 --sample_size 32 --judge JUDGE",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    size, channels = (_number(early_option(words, name)) for name in ("sample_size", "in_channels"))
    own_levels = early_option(words, "block_out_channels") is not None
    preset, data = early_option(words, "preset") or USUAL, early_option(words, "dataset_name")
    default = PretrainArguments.defaults(preset, data, size, channels, own_levels)
    args = parse_options(
        default, words, "pretrain", DESCRIPTION, basic=BASIC, titles=TITLES, config=options_of_record, examples=EXAMPLES
    )
    return lambda: run(args)


def _number(text: str | None) -> int | None:
    """The number in a text; None if it is none, which the parser says."""
    return int(text) if text is not None and text.isdecimal() else None


def run(args: PretrainArguments) -> None:
    """Print the configuration, or make the run and print its figures."""
    if args.output.dry_run:
        for note in args.rehearse():
            print(f"pecker-fast: {note}", file=sys.stderr)
        print(json.dumps(args.describe(), indent=1))
        return
    metrics = pretrain(args)
    if metrics:
        print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)))
        print(f"network: {args.folder / 'unet'}")
