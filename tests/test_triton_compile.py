"""Every Triton kernel compiles to machine code for real GPUs, without one, and keeps its values in registers.

The other tests run the kernels in Triton's interpreter, which accepts code that no GPU could run. This file is its own
child process too: there TRITON_INTERPRET must be unset before triton is imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REGISTERS_AT_MOST = 128


def _cases():
    """(name, kernel, constants, {argument: type} where it is not an int64 table, number of warps)."""
    import triton.language as tl

    from pecker_fast.kernels import masked_adam, packing, pointwise, sampled_select, select

    chunked = {"n_chunks": "i32"}
    f32, bf16 = tl.float32, tl.bfloat16
    for dtype in (f32, bf16):
        constants = {"REDUCE": 2, "ACC": f32, "GRAD": dtype, "ALIGNED": True, "BLOCK": pointwise.BLOCK}
        yield f"accumulate {dtype}", pointwise.accumulate_kernel, constants, chunked, pointwise.NUM_WARPS
        constants = {
            "SCALED": True, "MASKED": True, "JOINT": True, "DTYPE": dtype, "COMPUTE": f32, "ALIGNED": True,
            "BLOCK": pointwise.BLOCK,
        }  # fmt: skip
        types = {**chunked, "words": "*i32", "grad_scale": "*fp32"}
        yield f"count_nonfinite {dtype}", pointwise.count_nonfinite_kernel, constants, types, pointwise.NUM_WARPS
    constants = {"INTEGER": tl.int32, "BLOCK": pointwise.BLOCK}
    yield "apply_mask", pointwise.apply_mask_kernel, constants, {**chunked, "words": "*i32"}, pointwise.NUM_WARPS
    types = {**chunked, "words": "*i32"}
    yield "block_counts", packing.block_counts_kernel, {"BLOCK": packing.PACK_BLOCK}, types, 4
    for unpack in (False, True):
        types = {"dense": "*i32", "packed": "*i32", "words": "*i32", "numel": "i64", "count": "i64"}
        constants = {"UNPACK": unpack, "BLOCK": packing.BLOCK}
        yield f"move unpack={unpack}", packing.move_kernel, constants, types, packing.NUM_WARPS
    yield from _adam_cases(masked_adam)
    yield from _select_cases(select)
    yield from _sampled_cases(sampled_select, select)


def _adam_cases(masked_adam):
    import triton.language as tl

    names = masked_adam.masked_adam_kernel.arg_names
    off = {name: False for name in names[names.index("MASKED") : names.index("PACK_BLOCK")]}
    shape = {"COUNT": None, "COUNT_TOP": 0, "PACK_BLOCK": masked_adam.PACK_BLOCK, "BLOCK": masked_adam.BLOCK}
    types = {
        "n_chunks": "i32", "words": "*i32", "corrections": "*fp32", "hyper": "*fp64", "lr": "*fp64",
        "bias_table": "*fp32", "bias_rows": "i32", "grad_scale": "*fp32", "found_inf": "*fp32",
    }  # fmt: skip
    masked = {"MASKED": True, "HAS_WORDS": True}
    full = dict.fromkeys(["SCALED", "GUARDED", "CLIP", "MAX_UPDATE", "COUPLED", "HAS_EMA", "ZERO_NONFINITE"], True)
    kinds = {
        "plain": {"HAS_M": True, "ALIGNED": True},
        "plain everything": {**full, "HAS_M": True, "HAS_MAX": True, "HAS_MASTER": True, "ALIGNED": True},
        "joint": {**full, "JOINT": True, "HAS_WORDS": True, "RETAIN": True, "GRADS_OPTIONAL": True, "ALIGNED": True},
        "masked": {**masked, "HAS_M": True, "COUNT": tl.int16, "COUNT_TOP": 32767},
        "masked everything": {**masked, **full, "HAS_M": True, "HAS_MAX": True, "EMA_FROZEN": True},
        "packed": {**masked, "PACKED": True, "HAS_M": True},
    }
    for kind, flags in kinds.items():
        for dtype in (tl.float32, tl.bfloat16):
            constants = {**off, **shape, **flags, "DTYPE": dtype, "COMPUTE": tl.float32}
            constants["STOCHASTIC"] = dtype == tl.bfloat16 and not constants["HAS_MASTER"]
            yield f"masked_adam {kind} {dtype}", masked_adam.masked_adam_kernel, constants, types, masked_adam.NUM_WARPS
    constants = {**off, **shape, "HAS_M": True, "ALIGNED": True, "DTYPE": tl.float64, "COMPUTE": tl.float64}
    types = {**types, "corrections": "*fp64", "bias_table": "*fp64"}
    yield "masked_adam plain fp64", masked_adam.masked_adam_kernel, constants, types, masked_adam.NUM_WARPS
    types = {"steps": "*fp32", "hyper": "*fp64", "corrections": "*fp32", "count": "i32"}
    yield "prepare", masked_adam.prepare_kernel, {"BLOCK": 128}, types, 4


def _select_cases(select):
    import triton.language as tl

    types = {
        "n_chunks": "i32", "rows": "i32", "words": "*i32", "width": "i32", "all_chunks": "i32",
        "keys": "*i32", "smallest": "*i32", "row": "i32",
    }  # fmt: skip
    tile = {"ALIGNED": True, "BLOCK": select.BLOCK, "FLAGGED": True}
    for dtype in (tl.float32, tl.bfloat16):
        constants = {**tile, "DTYPE": dtype, "SHIFT": 10, "BITS": 10, "PREVIOUS_BITS": 11, "HISTOGRAM_STRIDE": 4096}
        yield f"histogram {dtype}", select.histogram_kernel, constants, types, select.NUM_WARPS
        constants = {**tile, "DTYPE": dtype}
        yield f"ties {dtype}", select.ties_kernel, constants, types, select.NUM_WARPS
        constants = {**tile, "DTYPE": dtype, "COUNT_NAN": False}
        yield f"words {dtype}", select.words_kernel, constants, types, select.NUM_WARPS
    constants = {
        **tile, "DTYPE": tl.float32, "FLAGGED": False, "SHIFT": 20, "BITS": 11, "PREVIOUS_BITS": 0,
        "HISTOGRAM_STRIDE": 2048,
    }  # fmt: skip
    yield "radix_histogram", select.histogram_kernel, constants, {**types, "prefixes": "*i32"}, select.NUM_WARPS
    constants = {
        "TIES_ALL": False, "HISTOGRAM_STRIDE": 4096, "LEVEL_0_BITS": 11, "LEVEL_2_START": 3072, "LEVEL_2_BITS": 10,
        "FLAGGED": True,
    }  # fmt: skip
    yield "threshold", select.threshold_kernel, constants, types, 4


def _sampled_cases(sampled, select):
    import triton.language as tl

    types = {
        "n_chunks": "i32", "rows": "i32", "words": "*i32", "width": "i32", "capacity": "i32", "smallest": "*i32",
        "flags": "*i32", "places": "i64", "samples": "i32", "n_tensors": "i32", "group": "i32", "sigmas": "fp32",
        "spare": "fp32",
    }  # fmt: skip
    for dtype in (tl.float32, tl.bfloat16):
        constants = {"SEARCH_STEPS": 9, "GROUPED": dtype == tl.bfloat16, "DTYPE": dtype, "BLOCK": 1024}
        yield f"sample {dtype}", sampled.sample_kernel, constants, types, 4
        constants = {"TIES_ALL": dtype == tl.bfloat16, "DTYPE": dtype, "ALIGNED": True, "BLOCK": select.BLOCK}
        yield f"mark {dtype}", sampled.mark_kernel, constants, types, select.NUM_WARPS
    yield "bracket", sampled.bracket_kernel, {}, types, 1
    for first, previous, shift, bits in ((False, 0, 52, 11), (True, 11, 42, 10), (False, 10, 21, 11)):
        constants = {
            "FIRST": first, "PREVIOUS_BITS": previous, "SHIFT": shift, "BITS": bits, "STRIDE": 9216, "BLOCK": 1024,
        }  # fmt: skip
        yield f"candidate_histogram {shift}", sampled.candidate_histogram_kernel, constants, types, 4
    constants = {"TIES_ALL": False, "BITS": 10, "SHIFT": 0, "STRIDE": 9216, "BLOCK": 1024}
    yield "patch", sampled.patch_kernel, constants, types, 4


def _compile(kernel, constants: dict, types: dict, num_warps: int, capability: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else types.get(n, "*i64") for n in kernel.arg_names}
    tables = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in tables}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": num_warps}).asm["ptx"]
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        architecture = re.search(r"\.target\s+(\w+)", ptx).group(1)
        command = [ptxas, "-v", f"-arch={architecture}", path, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "vector_accesses": len(re.findall(r"(?:ld|st)\.global[\w.:]*\.v[248]\.", ptx)),
    }


def _main() -> None:
    results = {}
    for name, kernel, constants, types, num_warps in _cases():
        for capability in (90,) if "bf16" in name else (80, 90):
            key = f"{name} sm_{capability}"
            results[key] = _compile(kernel, constants, types, num_warps, capability)
            print(key, results[key], file=sys.stderr)
    print(json.dumps(results))


def test_kernels_compile_for_gpus_without_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    # An empty cache: compilation is what is tested.
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    results = json.loads(child.stdout.splitlines()[-1])
    assert results
    for name, result in results.items():
        assert result["spilled"] == 0, f"{name}: {result}"
        assert result["registers"] <= REGISTERS_AT_MOST, f"{name}: {result}"
        if name.startswith(
            ("accumulate", "count_nonfinite", "masked_adam plain", "masked_adam joint", "histogram", "mark")
        ):
            assert result["vector_accesses"] > 0, f"{name}: {result}"


if __name__ == "__main__":
    _main()
