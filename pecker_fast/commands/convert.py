"""``pecker-fast convert``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.convert import convert


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(convert, words, "convert")
    return lambda: print(call())
