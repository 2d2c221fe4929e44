"""``pecker-fast ablate``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.ablate import ablate


def parse(words: Sequence[str]) -> Callable[[], None]:
    return parse_call(ablate, words, "ablate")
