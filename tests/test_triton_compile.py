"""Every Triton kernel compiles to machine code for real GPUs, without one, and keeps its values in registers.

The other tests run the kernels in the interpreter, which accepts code that no GPU could run. Here the operators are
called with a driver that only names a GPU: arguments are bound, specialised and compiled as in a real launch, but
nothing is launched. This runs in a child process, because TRITON_INTERPRET must be unset before triton is imported.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The limits hold from this release on. Older ones ship another assembler: with 3.4 a selection kernel takes 168
# registers and spills two of them on sm_90.
TUNED_WITH = (3, 5)
REGISTERS_AT_MOST = 128
VECTORISED = ("accumulate", "plain step", "joint step")


class _NamedGpu:
    """The part of a triton driver that compilation needs."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # Compiled kernels are kept by device.
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def _calls() -> Iterator[tuple[str, Callable[[], object], bool]]:
    """(label, call, whether for every GPU or for the newest only)."""
    import torch
    from pecker_fast.kernels.sampled_select import Sampling

    from pecker_fast.kernels import operator
    from pecker_fast.ops.reference import bias_table

    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64
    numels = [5000, 77, 1]
    offsets = [0, 157, 160, 161]
    words = torch.zeros(161, dtype=torch.int32)
    scores = {t: [torch.randn(n).to(t) for n in numels] for t in (f32, bf16, f64)}
    mixed = [torch.randn(64), torch.randn(64).to(torch.float16)]
    ks = torch.tensor([100, 200])
    sampling = Sampling(from_entries=1)
    yield "sampled selection", lambda: operator("select")(scores[f32], ks, sampling=sampling), True
    yield "sampled selection, bfloat16", lambda: operator("select")(scores[bf16], ks, True, sampling=sampling), False
    yield "selection, mixed", lambda: operator("select")(mixed, ks), False
    keys = torch.tensor([5, 6], dtype=torch.int32)
    yield "threshold_mask", lambda: operator("threshold_mask")(scores[f32], keys, ks), True
    yield "radix_histogram", lambda: operator("radix_histogram")(scores[f32], keys, 1), True
    relative = {t: (scores[t], torch.ones(3)) for t in (f32, bf16)}
    for t in (f32, bf16):
        yield (
            f"sampled selection, relative {t}",
            lambda t=t: operator("select")(scores[t], ks, False, *relative[t], sampling=sampling),
            t == f32,
        )
        yield f"magnitude_sums {t}", lambda t=t: operator("magnitude_sums")(scores[t]), t == f32
    yield "threshold_mask, relative", lambda: operator("threshold_mask")(scores[f32], keys, ks, *relative[f32]), False
    yield "radix_histogram, relative", lambda: operator("radix_histogram")(scores[f32], keys, 1, *relative[f32]), False
    yield "apply_mask_", lambda: operator("apply_mask_")(scores[f32], words, offsets), False
    yield "block_counts", lambda: operator("block_counts")(words, offsets, numels), False
    yield "pack", lambda: operator("pack")(scores[f32][0], words, 100), False
    yield "unpack", lambda: operator("unpack")(torch.zeros(100, dtype=torch.int16), words, 5000), False
    for dtype in (f32, bf16):
        yield (
            f"accumulate_ {dtype}",
            lambda t=dtype: operator("accumulate_")(scores[f32], scores[t], "sq_sum"),
            dtype == f32,
        )
    scale, found_inf = torch.tensor(2.0), torch.tensor(0.0)
    sparse = [None, *scores[f32][1:]]
    yield "count_nonfinite", lambda: operator("count_nonfinite")(scores[f32], sparse, words, offsets, scale), True

    steps, lr = torch.ones(3), torch.tensor(1e-3, dtype=f64)

    def step(
        dtype, compute=f32, masked_grads=(), m=True, amsgrad=False, masters=False, ema=False, counts=False, **more
    ):
        state = lambda used: [torch.zeros(n, dtype=compute) for n in numels] if used else []  # noqa: E731
        with_words = more.pop("masked", bool(masked_grads))
        everything = more.pop("everything", False)
        options = {
            "weight_decay": 0.1, "clip_value": 1.0, "max_update": 1.0, "zero_nonfinite": True, "ema_decay": 0.99,
        }  # fmt: skip
        operator("masked_adam_")(
            scores[dtype],
            scores[dtype],
            list(masked_grads),
            state(m),
            state(True),
            state(amsgrad),
            state(masters),
            state(ema),
            [torch.zeros(n, dtype=torch.int16) for n in numels] if counts else [],
            steps,
            lr,
            bias_table(0.9, 0.999, compute, torch.device("cpu")) if counts else None,
            words if with_words else None,
            offsets if with_words else [],
            more.pop("packed_offsets", None),
            scale if everything else None,
            found_inf if everything else None,
            beta1=0.9 if m else 0.0,
            beta2=0.999,
            eps=1e-8,
            **(options if everything else {}),
            **more,
        )

    for dtype in (f32, bf16):
        rounding = {"stochastic_rounding": dtype == bf16}
        both = dtype == f32
        yield f"plain step {dtype}", lambda t=dtype, r=rounding: step(t, **r), both
        yield (
            f"plain step, everything {dtype}",
            lambda t=dtype: step(t, amsgrad=True, masters=True, ema=True, everything=True),
            False,
        )
        missing = [None, *scores[dtype][1:]]
        yield (
            f"joint step {dtype}",
            lambda t=dtype, g=missing: step(
                t, masked_grads=g, m=False, retain_variance=True, ema=True, everything=True
            ),
            both,
        )
        yield f"masked step {dtype}", lambda t=dtype, r=rounding: step(t, masked=True, counts=True, **r), both
        yield (
            f"masked step, everything {dtype}",
            lambda t=dtype: step(t, masked=True, amsgrad=True, ema=True, ema_everywhere=True, everything=True),
            False,
        )
        packed = torch.zeros(3, dtype=torch.int64)
        yield f"packed step {dtype}", lambda t=dtype, p=packed: step(t, masked=True, packed_offsets=p), both
    yield "plain step torch.float64", lambda: step(f64, compute=f64), False


def _resources(kernel) -> dict:
    """The resources that the machine code of a compiled kernel uses."""
    import triton

    # A program of Triton's own wheel, next to its assembler.
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        output = subprocess.run([program, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    # Spilled registers go to the stack.
    counts = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
    return {**counts, "vectors": len(re.findall(r"(?:ld|st)\.global[\w.:]*\.v[248]\.", kernel.asm["ptx"]))}


def _main(labels: list[str]) -> None:
    """Compile the kernels of the calls with these labels for the newest GPU, or of all calls for both."""
    from triton.runtime import driver, jit

    compiled = []
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert len(grid) == 1 and grid[0] > 0, f"{self.__name__}: grid {grid}"
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    jit.JITFunction.run = compile_only
    results, seen = {}, set()
    for capability in (90,) if labels else (90, 80):
        driver.set_active(_NamedGpu(capability))
        for label, call, everywhere in _calls():
            if label in labels if labels else everywhere or capability == 90:
                compiled.clear()
                call()
                for name, kernel in compiled:
                    if kernel.hash not in seen:
                        seen.add(kernel.hash)
                        results[f"sm_{capability}, {label}: {name} ({len(seen)})"] = _resources(kernel)
    print(json.dumps(results))


# A kernel that selects, one that steps.
SOME = ["threshold_mask", "plain step torch.float32"]


@pytest.mark.parametrize("labels", [pytest.param(SOME, id="some"), pytest.param([], id="all", marks=pytest.mark.slow)])
def test_kernels_compile_for_gpus_without_spills(labels, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    # An empty cache, because compilation is under test.
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    child = subprocess.run([sys.executable, __file__, *labels], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout.splitlines()[-1])
    assert all(any(label in name for name in results) for label in labels or [*VECTORISED, *SOME])
    release = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    for name, result in results.items() if release >= TUNED_WITH else ():
        assert result["stack"] == 0 and result["local"] == 0, f"{name}: {result}"
        assert result["reg"] <= REGISTERS_AT_MOST, f"{name}: {result}"
        if any(label in name for label in VECTORISED) and "prepare" not in name:
            assert result["vectors"] > 0, f"{name}: {result}"


if __name__ == "__main__":
    _main(sys.argv[1:])
