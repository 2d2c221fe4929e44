"""``pecker-fast demo``."""

import time
from collections.abc import Callable, Sequence

from ..parsing import parse_call
from ..runs.demo import demo


def parse(words: Sequence[str]) -> Callable[[], None]:
    call = parse_call(demo, words, "demo")

    def run() -> None:
        start = time.perf_counter()
        report, table = call()
        print(f"\n{table}\n{time.perf_counter() - start:.0f} s in all; report: {report}")

    return run
