"""``pecker-fast mask``: density by tensor and by module."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.masks import describe_mask, mask

EXAMPLES = ("runs/digits-pecker-seed0", "--preset digits --forget_classes 0,3 --density 0.1", "mask.safetensors")


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(
        mask, words, "mask", positional={"run": "RUN"}, aliases={"preset": "preset_name"}, examples=EXAMPLES
    )
    return lambda: print(describe_mask(call()))
