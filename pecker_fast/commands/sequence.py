"""``pecker-fast sequence``."""

from collections.abc import Callable, Sequence
from functools import partial

from ..parsing import early_option, parse_options
from ..runs.remembered import preset_from
from ..runs.sequence import SequenceArguments, sequence

DESCRIPTION = """Forget classes one request after the other and measure all of them after each; then all at once, to
compare. Request i forgets all classes up to the i-th. One-step generators start from the previous request's generator,
with the pretrained network as teacher; other methods take the previous request's network as the pretrained one. The
same command again continues where it was interrupted, and with further classes it adds requests."""


def parse(words: Sequence[str]) -> Callable[[], None]:
    default = SequenceArguments(preset=preset_from(partial(early_option, words)))
    args = parse_options(default, words, "sequence", DESCRIPTION)
    return lambda: run(args)


def run(args: SequenceArguments) -> None:
    """Run the requests, and print the table."""
    report, table = sequence(args)
    print(f"{table}\nreport: {report}")
