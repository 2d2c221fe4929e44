"""Size and decoding speed of the positions in patch files, and the speed of applying a patch in memory.

``python -m pecker_fast.benchmarks.patch_files --json benchmarks/results/patch-files.json``. One thread; processor time,
the median of interleaved repeats. The rivals compress a bit map of one bit a weight.
"""

import argparse
import json
import lzma
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pecker_fast.patches import Patch, switch_
from pecker_fast.patches.positions import decode, encode

from .run import conditions, save

DENSITIES = (0.1, 0.05, 0.02, 0.01)


def processor_seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor time of each function, called in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def positions_row(density: float, numel: int, repeats: int) -> dict[str, Any]:
    """Bits a weight of each code, and millions of weights that it decodes a second."""
    chosen = np.random.default_rng(0).random(numel) < density
    code, data = encode(np.flatnonzero(chosen), numel)
    bit_map = np.packbits(chosen, bitorder="little").tobytes()
    packed = {"zlib": zlib.compress(bit_map, 9), "lzma": lzma.compress(bit_map)}

    def from_map(decompress: Callable[[bytes], bytes], content: bytes) -> np.ndarray:
        return np.flatnonzero(np.unpackbits(np.frombuffer(decompress(content), np.uint8), bitorder="little"))

    functions: dict[str, Callable[[], object]] = {
        "patch": lambda: decode(code, data),
        "zlib": lambda: from_map(zlib.decompress, packed["zlib"]),
        "lzma": lambda: from_map(lzma.decompress, packed["lzma"]),
    }
    seconds = processor_seconds(functions, repeats)
    sizes = {"patch": len(data), **{name: len(content) for name, content in packed.items()}}
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    return {
        "density": density,
        "entropy": entropy,
        "bits": {name: 8 * size / numel for name, size in sizes.items()},
        "millions_a_second": {name: numel / 1e6 / value for name, value in seconds.items()},
    }


def apply_speed(density: float, numel: int, repeats: int) -> float:
    """MB of float32 weights a second of a patch applied and reverted in memory, with all checks."""
    generator = torch.Generator().manual_seed(0)
    base = {"weight": torch.randn(numel, generator=generator)}
    moved = torch.rand(numel, generator=generator) < density
    patch = Patch.between(base, {"weight": torch.where(moved, base["weight"] + 1, base["weight"])})
    state = {"weight": base["weight"].clone()}

    def work() -> None:
        switch_(state, [patch], False)
        switch_(state, [patch], True)

    return 2 * 4 * numel / 1e6 / processor_seconds({"apply": work}, repeats)["apply"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="positions of patch files: size and speed")
    parser.add_argument("--numel", type=int, default=1 << 23, help="weights")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [positions_row(density, options.numel, options.repeats) for density in DENSITIES]
    speed = apply_speed(0.05, 4 * options.numel, min(3, options.repeats))
    for row in rows:
        print(json.dumps(row))
    print(f"applying at density .05: {speed:.0f} MB/s")
    if options.json:
        results = {"conditions": conditions(torch.device("cpu")), "numel": options.numel, "rows": rows}
        save({**results, "apply_mb_per_second": speed}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
