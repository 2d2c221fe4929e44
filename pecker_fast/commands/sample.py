"""``pecker-fast sample``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.sample import sample


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(sample, words, "sample", aliases={"preset": "--preset_name"})
    return lambda: print(call())
