"""``pecker-fast convert``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.convert import convert

EXAMPLES = ("model.pkl unet", "model.pkl unet --like SD15_FOLDER --key ema")


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(convert, words, "convert", positional={"input": "FILE", "output": "FOLDER"}, examples=EXAMPLES)
    return lambda: print(call())
