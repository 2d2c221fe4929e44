"""``pecker-fast sample``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.sample import sample

PLACES = {"pretrained_model_name_or_path": "RUN"}
EXAMPLES = ("runs/digits-pecker-seed0 --labels 0,1 --output drawn.png", "--preset digits --sampler ddim")


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(sample, words, "sample", positional=PLACES, aliases={"preset": "preset_name"}, examples=EXAMPLES)
    return lambda: print(call())
