"""The code that nvcc generates for the CUDA kernels, by its disassembly. Needs no GPU.

Registers, local memory, vector accesses and their order, instructions an entry.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pecker_fast.benchmarks import sass

SOURCES = sorted(path.stem for path in sass.CUDA_SOURCES.glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")

STREAMING_REGISTERS = 64
# Kernels that may use more registers: the limit, and the reason.
MORE_REGISTERS = {
    "bracket_kernelILi8": (80, "its shared memory lets three blocks run at a time, which have as many registers"),
    "bracket_kernelILi1ELb1": (80, "division takes registers: three blocks run at a time"),
    "adam_kernelIdd": (128, "double precision needs two registers a value; it is for checking, not for speed"),
}

pytestmark = [
    pytest.mark.skipif(
        sass.find_tool("nvcc") is None, reason="nvcc was not found (install the CUDA toolkit or set CUDA_HOME)"
    ),
    pytest.mark.skipif(
        sass.find_tool("cuobjdump") is None, reason="cuobjdump was not found (install the CUDA toolkit or triton)"
    ),
]


@pytest.fixture(scope="module")
def cubins(request, tmp_path_factory):
    """The path of each source's code for each architecture, as a future: that of the installed library. If one of
    the sources is newer, they are compiled for the selected tests, two at a time."""
    built, folder = sass.built_cubins(tmp_path_factory.mktemp("built")), tmp_path_factory.mktemp("compiled")

    def cubin(source: str, architecture: str) -> Path:
        if (source, architecture) not in built:
            path = folder / f"{source}.{architecture}.cubin"
            sass.compile_source(source, architecture, path)
            return path
        return built[source, architecture]

    items = [item for item in request.session.items if item.module is request.module]
    own = [item.callspec.params for item in items if hasattr(item, "callspec")]
    jobs = dict.fromkeys((job["source"], job["architecture"]) for job in own if "source" in job)
    with ThreadPoolExecutor(2) as pool:
        yield {job: pool.submit(cubin, *job) for job in jobs}


def register_limit(kernel: str) -> int:
    return next((limit for name, (limit, _) in MORE_REGISTERS.items() if name in kernel), STREAMING_REGISTERS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_registers_and_local_memory(source, architecture, cubins):
    usage = sass.resource_usage(cubins[source, architecture].result())
    has_kernels = "__global__" in (sass.CUDA_SOURCES / f"{source}.cu").read_text() or source.startswith("adam_")
    assert usage or not has_kernels, "the compiler reported no kernel"
    problems = [
        f"{sass.demangle(kernel)}: {used}, at most {register_limit(kernel)} registers"
        for kernel, used in usage.items()
        if used["stack"] or used["local"] or used["registers"] > register_limit(kernel)
    ]
    assert not problems, "\n".join(problems)


# ---- accesses of the streaming kernels

EVERY, MASKED, PACKED = range(3)
FIRST_MOMENT, WITH_EMA, JOINT, ANY_OPTION, RARE, PACKED_LISTS = 1, 2, 4, 8, 16, 32


def adam_version(kernel: sass.Kernel) -> tuple[bool, int, int]:
    """(16-bit parameters, Kind, options) of a compiled adam_kernel."""
    match = re.search(r"adam_kernelI(.*?)LN\w*?4KindE(\d)ELi(\d+)E", kernel.mangled)
    assert match, kernel.mangled
    return match[1] != "ff", int(match[2]), int(match[3])


def adam_lists(narrow: bool, kind: int, options: int) -> tuple[int, int]:
    """Vectors that a group loads and stores with all lists that this version works on."""
    anything, rare = bool(options & ANY_OPTION), bool(options & RARE)
    first_moment, ema = anything or bool(options & FIRST_MOMENT), anything or bool(options & WITH_EMA)
    masked_grad = kind == EVERY and (anything or bool(options & JOINT))
    # The moments of packed state are not accessed as vectors.
    moments = 0 if kind == PACKED else first_moment + 1 + rare
    stored = 1 + moments + ema + (rare and narrow)
    return stored + 1 + masked_grad, stored


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["adam_f32", "adam_bf16", "adam_fp16"])
def test_adam_accesses_vectors_and_waits_once(source, architecture, cubins):
    """On the path of whole, aligned tiles: one vector access a list, no scalar store, no use before the last load."""
    kernels = sass.disassemble(cubins[source, architecture].result())
    assert len(kernels) == 14
    for kernel in kernels:
        version = narrow, kind, options = adam_version(kernel)
        (loop,) = kernel.streaming_loops()
        path = kernel.fast_path(loop)
        accesses = path.count("is_vector_load"), path.count("is_vector_store")
        assert accesses == adam_lists(*version), f"{kernel.name}: {accesses} vectors in and out"
        early = sass.early_uses(path.instructions)
        if options & PACKED_LISTS:
            # The average is read last: it would be packed too, and there are no registers to keep it.
            last = [instruction for instruction in path.instructions if instruction.is_vector_load][-1]
            early = [(use, load) for use, load in early if load is not last]
        assert not early, f"{kernel.name}: {early[0][0]} before {early[0][1]}"
        lists = adam_lists(*version)[1]
        if kind != PACKED:
            scalars = path.count("is_scalar_store")
            assert scalars == 0, f"{kernel.name}: {scalars} scalar stores beside the vectors"
            # Ends of tensors are stored entry by entry: four a list, and nothing else is.
            counts = 2 * sass.ENTRIES if options & RARE else 0
            assert kernel.count("is_scalar_store") <= sass.ENTRIES * lists + counts, kernel.name
        if kind == EVERY and not options & ANY_OPTION:
            # 97 and 110 before this path existed.
            count, limit = len(path.instructions) / sass.ENTRIES, 70 if narrow else 60
            assert count <= limit, f"{kernel.name}: {count} instructions an entry"


# By the kernel's mangled name: vectors in and out of a round, and how many loops have them: one an element type if a
# kernel takes several. 64-bit entries are left out: one of them alone is as wide as a vector.
OTHER_ACCESSES = {
    "accumulate_kernel": ((2, 1), 3),
    "apply_mask_kernel": ((1, 1), 2),
    "unpack_kernelIj": ((0, 1), 2),
    "unpack_kernelIt": ((0, 1), 2),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["pointwise", "packing"])
def test_other_kernels_access_vectors_and_wait_once(source, architecture, cubins):
    checked = 0
    for kernel in sass.disassemble(cubins[source, architecture].result()):
        paths = [kernel.fast_path(loop) for loop in kernel.streaming_loops()]
        accesses = [(path.count("is_vector_load"), path.count("is_vector_store")) for path in paths]
        for name, (expected, times) in OTHER_ACCESSES.items():
            if name in kernel.mangled:
                assert accesses.count(expected) == times, f"{kernel.name}: {accesses}"
                checked += 1
        if re.search("pack_kernelI[jt]|count_nonfinite_kernelI[^d]", kernel.mangled):
            loads = kernel.count("is_vector_load")
            assert loads >= 1 or "unpack" in kernel.mangled, f"{kernel.name}: no vector load"
        for path in paths:
            assert not sass.early_uses(path.instructions), kernel.name
    assert checked == 2


def test_early_uses_are_detected():
    """A load that waits for the one before it, and one that does not."""
    text = """
		Function : example
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   {use} ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R12.64] ;
        /*0030*/                   FADD R16, R4, R8 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R16 ;
        /*0050*/                   BRA 0x0 ;
"""
    for use, expected in (("FADD R20, R5, R21", 1), ("FADD R20, R22, R21", 0), ("STS [R6], R30", 1)):
        (kernel,) = sass.parse(text.format(use=use))
        (loop,) = kernel.streaming_loops()
        path = kernel.fast_path(loop)
        assert (path.count("is_vector_load"), path.count("is_vector_store")) == (2, 1)
        assert len(sass.early_uses(path.instructions)) == expected, use
