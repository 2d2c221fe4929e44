"""``pecker-fast delta``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.delta import delta


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(delta, words, "delta", positional="action")
    return lambda: print(call())
