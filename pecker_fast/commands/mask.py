"""``pecker-fast mask``: density by tensor and by module."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.masks import describe_mask, mask


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(mask, words, "mask", aliases={"preset": "--preset_name"})
    return lambda: print(describe_mask(call()))
