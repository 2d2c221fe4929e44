"""``pecker-fast train-classifier``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.train_classifier import train_classifier

EXAMPLES = (
    "--preset cifar10 --data_root data --download --output judge.safetensors",
    "--preset cifar10 --dataset_name folder:PICTURES --epochs 5 --output judge.safetensors",
)


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(train_classifier, words, "train-classifier", aliases={"preset": "preset_name"}, examples=EXAMPLES)

    def run() -> None:
        judge, path = call()
        print(f"recognises {judge.accuracy:.1%} of held-out images; saved: {path}")

    return run
