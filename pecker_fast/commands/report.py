"""``pecker-fast report``."""

from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.reports import write_report

EXAMPLES = ("runs/digits-pecker-seed0", "runs/compare-digits")


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(write_report, words, "report", positional={"run": "RUN"}, examples=EXAMPLES)

    def run() -> None:
        path, notes = call()
        for note in notes:
            print(note)
        print(f"report: {path}, {path.with_suffix('.html')}")

    return run
