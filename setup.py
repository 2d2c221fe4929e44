"""Build of the compiled kernels; everything else about the package is in pyproject.toml.

What is missing on this machine (a C++ compiler, nvcc, a CUDA build of torch) never fails the installation: those
kernels are left out, the reason is kept in pecker_fast/_build.json, and ``pecker-fast env`` prints it.

Environment
-----------
PECKER_FAST_BUILD_CPU=0, PECKER_FAST_BUILD_CUDA=0   leave these kernels out.
TORCH_CUDA_ARCH_LIST   GPU architectures, as torch reads it; default "8.0;9.0+PTX".
MAX_JOBS               compilations at a time.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
BUILD_RECORD = ROOT / "pecker_fast" / "_build.json"
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def relative(paths) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def why_no_cpu() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    if os.environ.get("PECKER_FAST_BUILD_CPU") == "0":
        return "left out by PECKER_FAST_BUILD_CPU=0"
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return f"torch is not installed in the build environment ({error}); install with --no-build-isolation"
    compiler = get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} was not found (install g++ or set CXX)"
    return None


def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if os.environ.get("PECKER_FAST_BUILD_CUDA") == "0":
        return "left out by PECKER_FAST_BUILD_CUDA=0"
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not (ROOT / "csrc" / "module_cuda.cpp").exists():
        return "this version has no CUDA kernels"
    home = cpp_extension.CUDA_HOME
    if home is None or not (Path(home) / "bin" / "nvcc").exists():
        return "no nvcc: install the CUDA toolkit or set CUDA_HOME"
    return None


def extensions(record: dict) -> list:
    """pecker_fast._C (CPU) and pecker_fast._C_cuda: apart, so that one can fail to build without the other."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    csrc = ROOT / "csrc"
    # No -ffast-math: NaN, inf and signed zeros are part of the contract. The kernels fuse multiply-adds themselves.
    cxx = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    if sys.platform == "win32":
        cxx = ["/O2"]
    sources = [csrc / "module.cpp", *csrc.glob("*_cpu.cpp"), *(csrc / "cpu").glob("*.cpp")]
    found = [
        CppExtension("pecker_fast._C", relative(sources), include_dirs=[str(csrc)], extra_compile_args={"cxx": cxx})
    ]
    if record["cuda"] is None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
        sources = [csrc / "module_cuda.cpp", *csrc.glob("cuda_*.cpp"), *csrc.glob("*_cuda.cu")]
        sources += (csrc / "cuda").glob("*.cu")
        flags = {"cxx": cxx, "nvcc": ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]}
        found.append(
            CUDAExtension("pecker_fast._C_cuda", relative(sources), include_dirs=[str(csrc)], extra_compile_args=flags)
        )
    return found


def build_command(record: dict):
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuild(BuildExtension):
        """Builds each extension that can be built, and records why the others cannot."""

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:  # a compiler's or linker's failure, whatever its type
                backend = "cuda" if ext.name.endswith("_cuda") else "cpu"
                record[backend] = f"the build failed: {error}"
                print(f"pecker_fast: no {backend} kernels: {record[backend]}", file=sys.stderr)
                # setuptools expects no file of an optional extension.
                ext.optional = True
            write_record(record)

    return OptionalBuild


def write_record(record: dict) -> None:
    BUILD_RECORD.write_text(json.dumps(record, indent=1) + "\n")


class BuildPyWithRecord(build_py):
    """Copies the build record into the wheel too: build_py runs before build_ext."""

    def run(self):
        super().run()
        if not self.editable_mode and BUILD_RECORD.exists():
            self.copy_file(str(BUILD_RECORD), str(Path(self.build_lib) / "pecker_fast" / BUILD_RECORD.name))


def main() -> None:
    record = {"cpu": why_no_cpu()}
    record["cuda"] = record["cpu"] or why_no_cuda()
    for backend, reason in record.items():
        if reason:
            print(f"pecker_fast: no {backend} kernels: {reason}", file=sys.stderr)
    write_record(record)
    options = {}
    if record["cpu"] is None:
        options = {
            "ext_modules": extensions(record),
            "cmdclass": {"build_ext": build_command(record), "build_py": BuildPyWithRecord},
        }
    else:
        options = {"cmdclass": {"build_py": BuildPyWithRecord}}
    setup(**options)


if __name__ == "__main__":
    main()
