"""Which part may import which, read from the sources; and which modules importing the package loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pecker_fast.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]

# Part of the package -> the parts it may import. Every part may import torch, numpy and the standard library.
ALLOWED = {
    # From ops only the layout: see test_kernels_import_only_the_layout_of_ops.
    "kernels": {"kernels", "ops"},
    "ops": {"ops", "kernels"},
    "flat": {"flat"},
    "files": {"files"},
    "names": {"names"},
    "records": {"records"},
    "locks": {"files", "locks", "records"},
    "run_records": {"figures", "records", "run_records"},
    "archives": {"archives"},
    "checks": {"checks", "names"},
    "sharding": {"sharding"},
    "entries": {"ops", "flat"},
    "mask_in_parts": {"ops", "entries", "mask", "scores"},
    "mask": {"files", "ops", "flat", "records", "sharding", "mask"},
    "scores": {"ops", "flat", "sharding", "mask", "scores"},
    "saliency": {"checks", "ops", "flat", "sharding", "mask", "scores", "saliency"},
    "adam": {"ops", "flat", "entries", "sharding", "mask", "adam"},
    "optim": {"ops", "flat", "sharding", "mask", "adam", "optim"},
    "patches": {"files", "hashing", "mask", "ops", "patches", "records"},
    "figures": {"figures"},
    "data": {"checks", "data"},
    "hashing": {"hashing"},
    "shifts": {"shifts"},
    "metrics": {"archives", "checks", "files", "metrics", "data", "hashing", "records", "shifts"},
    # Names of runs are imported lazily.
    "__init__": {"ops", "mask", "saliency", "optim", "patches", "runs"},
    "diffusion": {"checks", "diffusion"},
    "models": {"archives", "checks", "files", "hashing", "records", "diffusion", "models"},
    "profiling": {"profiling"},
    "parallel": {"parallel"},
    "report": {"figures", "files", "metrics", "records", "report", "run_records"},
    "robustness": {"checks", "robustness", "unlearning", "diffusion", "data", "metrics"},
    "unlearning": {
        "checks",
        "shifts",
        "unlearning",
        "diffusion",
        "profiling",
        "parallel",
        "sharding",
        "names",
        "mask",
        "entries",
        "mask_in_parts",
        "saliency",
        "optim",
        # Patches leave the entries of earlier ones alone.
        "patches",
    },
    "training": {
        "files",
        "records",
        "training",
        "checks",
        "unlearning",
        "diffusion",
        "parallel",
        "profiling",
        "optim",
        "saliency",
        "hashing",
    },
    "environment": {"ops", "__init__"},
    "benchmarks": {
        *("benchmarks", "ops", "mask", "saliency", "optim", "patches", "flat", "environment", "__init__"),
        *("diffusion", "models", "profiling", "unlearning", "training", "data", "metrics", "runs"),
        *("archives", "locks", "report"),
    },
    "runs": {
        *(
            "checks",
            "names",
            "figures",
            "files",
            "hashing",
            "locks",
            "parallel",
            "records",
            "run_records",
            "profiling",
            "environment",
            "mask",
            "patches",
        ),
        *("diffusion", "models", "data", "metrics", "unlearning", "training", "robustness", "report", "runs"),
    },
    "options": {"names", "options"},
    "parsing": {"names", "options", "parsing", "records"},
    # No command imports a command.
    "commands": {"names", "parsing", "figures", "runs", "parallel", "environment", "mask", "benchmarks"},
    "cli": {"commands", "names", "__init__"},
}
# Imported by nothing below them.
TOPS = {"cli", "__main__", "commands", "studies"}
# Lines of a subcommand, which parses, calls the library and prints.
COMMAND_LINES = 100
# Separate from the other benchmarks: studies run the commands' library.
STUDIES = ["benchmarks", "studies"]
THIRD_PARTY = {"kernels": {"torch", "triton"}, "ops": {"torch"}, "adam": {"torch"}}


def modules():
    for folder, prefix in (
        (ROOT / "pecker_fast", ()),
        (ROOT / "kernels", ("kernels",)),
        (ROOT / "benchmarks", ("benchmarks",)),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if not prefix and parts[0] in ("kernels", "benchmarks"):
                continue
            yield path, parts


def imports(path: Path, parts: tuple[str, ...]):
    """(part of the package or None, top-level name) of every import, wherever in the file it stands."""
    package = ("pecker_fast", *parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            # "from . import x": x may be a module or, at the top, a name of the package.
            names = [[*module, alias.name] for alias in node.names] if len(module) <= 1 and base else [module]
        else:
            continue
        for name in names:
            if name[0] != "pecker_fast":
                yield None, name[0]
            elif len(name) == 1:
                yield "__init__", "pecker_fast"
            elif name[1:3] == STUDIES:
                yield "studies", "pecker_fast"
            else:
                known = (ROOT / "pecker_fast" / name[1]).exists() or (ROOT / "pecker_fast" / f"{name[1]}.py").exists()
                yield (name[1] if known else "__init__"), "pecker_fast"


@pytest.mark.parametrize(("path", "parts"), [pytest.param(*m, id="/".join(m[1])) for m in modules()])
def test_layers(path, parts):
    part = "studies" if [*parts[:2]] == STUDIES else parts[0]
    for target, top in imports(path, parts):
        if target is not None:
            assert target not in TOPS or part in TOPS, f"{path} imports {target}, which nothing may import"
            # Studies are not part of the wheel.
            assert target != "studies" or part == "studies", f"{path} imports {target}"
            if part not in ("__main__", "studies"):
                assert part in ALLOWED, f"{part} is new: say in {__file__} what it may import"
                assert target in ALLOWED[part], f"{path} imports {target}: {part} may import {sorted(ALLOWED[part])}"
        elif part in THIRD_PARTY and top not in sys.stdlib_module_names:
            assert top in THIRD_PARTY[part], f"{path} imports {top}"


def test_kernels_import_only_the_layout_of_ops():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > 1:
                assert node.module == "ops.layout", f"{path} imports {node.module}"


# What defines a constant, and the files that may.
OWNERS = {
    r"(PACK_BLOCK|kPackBlock|kChunk|kAdamChunk) = \d": {"csrc/common/bit_words.h", "pecker_fast/ops/layout.py"},
    r"(?i)\b0x7f800000u?\b": {"csrc/common/radix_key.h", "csrc/common/adam_math.h", "pecker_fast/ops/layout.py"},
    r"\b11, 10, 10\b": {"csrc/common/radix_key.h", "pecker_fast/ops/layout.py"},
}


@pytest.mark.parametrize("pattern", OWNERS)
def test_constants_have_one_owner_a_language(pattern):
    sources = [path for _, path in sorted((str(p), p) for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    sources += [path for path, parts in modules() if parts[0] in ("kernels", "ops", "adam", "mask", "saliency")]
    files = set()
    for path in sources:
        code = "\n".join(line.split("//")[0].split("#")[0] for line in path.read_text().splitlines())
        if re.search(pattern, code):
            files.add(str(path.relative_to(ROOT)))
    assert files == OWNERS[pattern]


def test_subcommands_are_small_and_all_named():
    files = {path.stem: path for path in (ROOT / "pecker_fast" / "commands").glob("*.py") if path.stem != "__init__"}
    for path in files.values():
        assert len(path.read_text().splitlines()) <= COMMAND_LINES, f"{path}: what it does belongs to runs"
    assert {name.replace("-", "_") for name in COMMANDS} == set(files)


def test_training_knows_no_method():
    """The loop and the memory estimate see the protocol alone. Pretraining is a phase that methods share."""
    allowed = {"": None, "sharded": None, "denoising": "pretrain.py"}
    for path in (ROOT / "pecker_fast" / "training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if "unlearning" not in module.split("."):
                continue
            part = module.rpartition("unlearning")[2].removeprefix(".")
            assert part in allowed and allowed[part] in (None, path.name), f"{path} imports unlearning.{part}"
            names = {alias.name for alias in node.names}
            assert not names & {"method_class", "method_names"}, f"{path} knows methods by name"


def test_kernel_sources_are_free_of_torch():
    for folder in ("common", "cpu", "cuda"):
        for path in (ROOT / "csrc" / folder).iterdir():
            for line in path.read_text().splitlines():
                if line.startswith("#include"):
                    assert not any(word in line for word in ("torch", "ATen", "c10")), f"{path}: {line}"


def test_import_is_lean():
    code = (
        "import sys, torch, pecker_fast, pecker_fast.diffusion\n"
        "heavy = {'triton', 'torch_fidelity', 'diffusers', 'transformers', 'sklearn', 'torchvision'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_command_line_starts_lean():
    """A subcommand is imported when it is called, and imports diffusers only when it needs a network."""
    code = (
        "import sys\n"
        "from pecker_fast import cli\n"
        "assert not [name for name in sys.modules if name.startswith(('pecker_fast.runs', 'pecker_fast.commands'))]\n"
        "import pecker_fast.commands.unlearn\n"
        "heavy = {'diffusers', 'transformers', 'torchvision', 'matplotlib', 'sklearn', 'torch_fidelity'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
