"""Build of the compiled kernels; everything else about the package is in pyproject.toml.

Two libraries, each on its own: pecker_fast._C with the CPU kernels and pecker_fast._C_cuda with the CUDA ones. What is
missing on this machine (a C++ compiler, nvcc, a CUDA build of torch), or does not compile, never fails the
installation: those kernels are left out, the reason is kept in pecker_fast/_build.json, and ``pecker-fast env``
prints it.

Environment
-----------
PECKER_FAST_BUILD_CPU=0, PECKER_FAST_BUILD_CUDA=0   leave these kernels out.
TORCH_CUDA_ARCH_LIST   GPU architectures, as torch reads it; default "8.0;9.0+PTX".
MAX_JOBS               compilations at a time.

``build_in_place`` compiles without installing: benchmarks/gpu_check.py calls it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
RECORD_NAME = "_build.json"
LIBRARIES = {"cpu": "pecker_fast._C", "cuda": "pecker_fast._C_cuda"}
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def relative(paths) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def why_no_compiler() -> str | None:
    """Why no C++ can be compiled against torch here, or None."""
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError as error:
        return f"torch is not installed in the build environment ({error}); install with --no-build-isolation"
    compiler = get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} was not found (install g++ or set CXX)"
    return None


def why_no_cpu() -> str | None:
    """Why the CPU kernels cannot be built here, or None."""
    if os.environ.get("PECKER_FAST_BUILD_CPU") == "0":
        return "left out by PECKER_FAST_BUILD_CPU=0"
    return why_no_compiler()


def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if os.environ.get("PECKER_FAST_BUILD_CUDA") == "0":
        return "left out by PECKER_FAST_BUILD_CUDA=0"
    reason = why_no_compiler()
    if reason:
        return reason
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not list(CSRC.glob("cuda_*.cpp")):
        return "this version has no CUDA kernels"
    cpp_extension.CUDA_HOME = cuda_home(cpp_extension.CUDA_HOME)
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit: install one with nvcc and headers, or set CUDA_HOME"
    return None


def cuda_home(found: str | None) -> str | None:
    """The folder of the CUDA toolkit: the one that torch found, or that its nvcc names.

    torch takes the folder above the nvcc on PATH, which has no headers if that nvcc is a script or a link.
    """
    if found is None or not (Path(found) / "bin" / "nvcc").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        command = [str(Path(found) / "bin" / "nvcc"), "-dryrun", "-c", str(source)]
        report = subprocess.run(command, capture_output=True, text=True).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in report.splitlines() if "TOP=" in line]
    homes = [Path(found), *(Path(top).resolve() for top in tops)]
    return next((str(home) for home in homes if (home / "include" / "cuda_runtime.h").exists()), None)


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    sources = [CSRC / "module.cpp", *CSRC.glob("*_cpu.cpp"), *(CSRC / "cpu").glob("*.cpp")]
    # No -ffast-math: NaN, inf and signed zeros are part of the contract. Contraction into FMA is chosen by the kernels.
    flags = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    link_flags = []
    if sys.platform == "win32":
        flags = ["/O2"]
    elif sys.platform == "linux":
        # at::parallel_for is a template: built without OpenMP it runs on one thread, whatever torch's own threads are.
        flags.append("-fopenmp")
        link_flags.append("-fopenmp")
    return CppExtension(
        LIBRARIES["cpu"],
        relative(sources),
        include_dirs=[str(CSRC)],
        extra_compile_args={"cxx": flags},
        extra_link_args=link_flags,
    )


def cuda_extension():
    from torch.utils.cpp_extension import CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    sources = [*CSRC.glob("cuda_*.cpp"), *(CSRC / "cuda").glob("*.cu")]
    flags = {"cxx": ["-O3", "-fvisibility=hidden"], "nvcc": ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]}
    if sys.platform == "win32":
        flags["cxx"] = ["/O2"]
    else:
        flags["nvcc"] += ["-Xcompiler", "-fvisibility=hidden"]
    return CUDAExtension(LIBRARIES["cuda"], relative(sources), include_dirs=[str(CSRC)], extra_compile_args=flags)


def first_line(error: BaseException) -> str:
    form, *values = error.args or ("",)
    if values and isinstance(form, str) and form.count("%s") == len(values):
        # torch raises its words and what goes into them.
        return " ".join((form % tuple(values)).split())
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def optional_build(base: type[build_ext], record: dict) -> type[build_ext]:
    """A build_ext that builds each extension where it can, and records why where it cannot."""

    class OptionalBuild(base):
        def run(self):
            wanted, inplace, built = list(self.extensions or []), self.inplace, []
            compiler = self.compiler
            for extension in wanted:
                self.extensions, self.inplace, self.compiler = [extension], inplace, compiler
                try:
                    super().run()
                    built.append(extension)
                except Exception as error:  # the compiler's or linker's failure, whatever its type
                    backend = next(name for name, library in LIBRARIES.items() if library == extension.name)
                    record[backend] = f"the build failed: {first_line(error)}"
                    print(f"pecker_fast: no {backend} kernels: {record[backend]}", file=sys.stderr)
            self.extensions, self.inplace = built, inplace
            self.distribution.ext_modules = built
            self.remove_stale({extension.name for extension in built})
            write_record(record, ROOT if inplace or self.editable_mode else Path(self.build_lib))

        def remove_stale(self, built: set[str]):
            """Takes away libraries that an earlier build left where this one built none: they may not fit any more."""
            for library in LIBRARIES.values():
                path = Path(self.get_ext_fullpath(library))
                if library not in built:
                    path.unlink(missing_ok=True)
                    (Path(self.build_lib) / self.get_ext_filename(library)).unlink(missing_ok=True)

        def get_export_symbols(self, extension):
            # The libraries are loaded by torch and are no Python modules, which matters to the linker on Windows.
            return extension.export_symbols

    return OptionalBuild


def write_record(record: dict, root: Path) -> None:
    target = root / "pecker_fast" / RECORD_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


def build_py_with_record(record: dict) -> type[build_py]:
    class BuildPyWithRecord(build_py):
        """Writes the build record too: where nothing is compiled, build_ext does not run."""

        def run(self):
            super().run()
            write_record(record, ROOT if self.editable_mode else Path(self.build_lib))

    return BuildPyWithRecord


def plan_build() -> tuple[dict, list, type[build_ext]]:
    """The record with what cannot be built here, the extensions, and the command that builds them."""
    record = {"cpu": why_no_cpu(), "cuda": why_no_cuda()}
    for backend, reason in record.items():
        if reason:
            print(f"pecker_fast: no {backend} kernels: {reason}", file=sys.stderr)
    make = {"cpu": cpu_extension, "cuda": cuda_extension}
    extensions = [make[backend]() for backend, reason in record.items() if reason is None]
    base = build_ext
    if extensions:
        from torch.utils.cpp_extension import BuildExtension as base
    return record, extensions, optional_build(base, record)


def build_in_place() -> dict[str, str | None]:
    """Compiles the kernels into this source tree, with the packages at hand and no installation.

    Returns, as pecker_fast/_build.json holds it, why the kernels of a back end were not built, or None. Call with the
    source tree as the current folder.
    """
    record, extensions, command_class = plan_build()
    # Not setup(): it would read pyproject.toml, which asks for a newer setuptools than may be there.
    distribution = Distribution({"name": "pecker-fast", "packages": ["pecker_fast"], "ext_modules": extensions})
    command = command_class(distribution)
    command.inplace = True
    command.ensure_finalized()
    command.run()
    return record


def main() -> None:
    record, extensions, command_class = plan_build()
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": command_class, "build_py": build_py_with_record(record)},
    )


if __name__ == "__main__":
    main()
