"""``pecker-fast demo``."""

import time
from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.demo import demo

EXAMPLES = ("", "--forget_class 3 --cover_class 8 --output_dir runs/forget-3", "--resume")


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(demo, words, "demo", examples=EXAMPLES)

    def run() -> None:
        start = time.perf_counter()
        report, table = call()
        print(f"\n{table}\n{time.perf_counter() - start:.0f} s in all; report: {report}")

    return run
