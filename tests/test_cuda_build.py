"""What nvcc makes of the CUDA kernels: no spills, no local memory, registers within limits. Needs no GPU."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")
# As in setup.py.
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]

STREAMING_REGISTERS = 64
# Kernels that may use more registers: how many, and why.
MORE_REGISTERS = {
    "adam_kernel<double": (128, "double precision needs two registers a value; it is for checking, not for speed"),
}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    return next((str(path) for path in candidates if path.exists()), None) or shutil.which("nvcc")


pytestmark = pytest.mark.skipif(
    find_nvcc() is None, reason="nvcc was not found (install the CUDA toolkit or set CUDA_HOME)"
)


def demangle(name: str) -> str:
    for tool in (Path(find_nvcc()).parent / "cu++filt", shutil.which("c++filt")):
        if tool and Path(tool).exists():
            name = subprocess.run([str(tool), name], capture_output=True, text=True, check=True).stdout.strip()
            break
    return name.replace("pecker_fast::", "").replace("(anonymous namespace)::", "")


_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def resource_usage(source: Path, architecture: str, folder: Path) -> list[tuple[str, dict[str, int]]]:
    """(kernel, its stack, spill and register numbers) of every kernel in a file."""
    target = folder / f"{source.stem}.{architecture}.cubin"
    command = [find_nvcc(), *FLAGS, "-cubin", f"-arch={architecture}", "-Xptxas=-v", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)} failed:\n{result.stderr}"
    return [
        (demangle(match["name"]), {key: int(match[key]) for key in ("stack", "stores", "loads", "registers")})
        for match in _REPORT.finditer(result.stdout + result.stderr)
    ]


@pytest.fixture(scope="module")
def compilations(request, tmp_path_factory):
    """The files and architectures of the selected tests, compiled two at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    wanted = [item.callspec.params for item in request.session.items if item.module is request.module]
    with ThreadPoolExecutor(2) as pool:
        yield {
            (job["source"], job["architecture"]): pool.submit(
                resource_usage, ROOT / "csrc" / "cuda" / job["source"], job["architecture"], folder
            )
            for job in wanted
        }


def register_limit(kernel: str) -> int:
    return next((limit for name, (limit, _) in MORE_REGISTERS.items() if name in kernel), STREAMING_REGISTERS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source.name for source in SOURCES])
def test_registers_and_local_memory(source, architecture, compilations):
    kernels = compilations[source, architecture].result()
    has_kernels = "__global__" in (ROOT / "csrc" / "cuda" / source).read_text() or source.startswith("adam_")
    assert kernels or not has_kernels, "the compiler reported no kernel"
    problems = [
        f"{kernel}: {usage}, at most {register_limit(kernel)} registers"
        for kernel, usage in kernels
        if usage["stack"] or usage["stores"] or usage["loads"] or usage["registers"] > register_limit(kernel)
    ]
    assert not problems, "\n".join(problems)
