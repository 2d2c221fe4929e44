"""``pecker-fast sequence``."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..parsing import early_option, parse_options
from ..runs.presets import PRESETS
from ..runs.recorded import options_of_record
from ..runs.remembered import preset_from
from ..runs.sequence import SequenceArguments, sequence

DESCRIPTION = """Forget classes, or the concepts of a file (--preset sd15-celebrity|sdxl-celebrity), one request after
the other and measure all of them after each; then all at once, to compare. Request i forgets all up to the i-th.
One-step generators start from the previous request's generator, with the pretrained network as teacher; other methods
take the previous request's network as the pretrained one. The same command again continues where it was interrupted,
and with further classes or concepts it adds requests."""

EXAMPLES = ("--method pecker --forget_classes 0 3 7", "--method patch --forget_classes 0,3 --no-at_once")


def parse(words: Sequence[str]) -> Callable[[], None]:
    name = preset_from(partial(early_option, words))
    more: dict[str, Any] = {"config": options_of_record, "examples": EXAMPLES}
    if name in PRESETS and PRESETS[name].task == "prompts":
        # Imported only if needed: it brings libraries that take a while.
        from ..runs.prompts.sequence import PromptSequenceArguments, prompt_sequence

        prompts = parse_options(PromptSequenceArguments(preset=name), words, "sequence", DESCRIPTION, **more)
        return lambda: report(*prompt_sequence(prompts))
    args = parse_options(SequenceArguments(preset=name), words, "sequence", DESCRIPTION, **more)
    return lambda: report(*sequence(args))


def report(path: Path, table: str) -> None:
    """Print the table of a sequence."""
    print(f"{table}\nreport: {path}")
