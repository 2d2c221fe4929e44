"""``pecker-fast train-classifier``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.train_classifier import train_classifier


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(train_classifier, words, "train-classifier", aliases={"preset": "--preset_name"})

    def run() -> None:
        judge, path = call()
        print(f"recognises {judge.accuracy:.1%} of held-out images; saved: {path}")

    return run
