"""Contents of an installation; an installation without a compiler works and reports what is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pecker_fast as pf

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built without a C++ compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = ["pecker_fast", "kernels", "benchmarks", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "-w", str(folder)]
    environment = {**os.environ, "CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    result = subprocess.run([*command, str(source)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contains_only_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"pecker_fast"}
    for module in (
        "kernels/select.py",
        "kernels/adam_tile.py",
        "kernels/masked_adam.py",
        "benchmarks/registry.py",
        "ops/schemas.py",
        "py.typed",
        "adam/slots.py",
        "py.typed",
        "commands/unlearn.py",
        "runs/classes/task.py",
        "runs/presets/classes.py",
        "assets/prompts/retain.txt",
        "assets/digits/distilled/score/diffusion_pytorch_model.safetensors",
        "assets/digits/distilled/config.json",
        "assets/digits16/unet/diffusion_pytorch_model.safetensors",
        "assets/mnist/judge.safetensors",
    ):
        assert f"pecker_fast/{module}" in names
    assert not [name for name in names if name.endswith(".so")]
    # Studies run from a checkout.
    assert not [name for name in names if name.startswith("pecker_fast/benchmarks/studies")]


def test_every_package_is_listed():
    """All but the studies, which run from a checkout."""
    listed = set(re.findall(r'^    "(pecker_fast[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    folders = {"pecker_fast": ROOT / "pecker_fast"}
    folders |= {f"pecker_fast.{name}": ROOT / name for name in ("kernels", "benchmarks")}
    packages = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in folders.items()
        for path in folder.rglob("__init__.py")
    }
    assert listed == {name for name in packages if "studies" not in name}


def test_version_and_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    assert f"Version: {pf.__version__}" in lines
    needed = [line.split()[1] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    # None of the libraries of runs.
    assert {re.split(r"[<>=!~; ]", item)[0] for item in needed} == {
        "torch", "numpy", "safetensors", "docstring-parser", "tqdm",
    }  # fmt: skip
    extras = {line.split()[1] for line in lines if line.startswith("Provides-Extra:")}
    assert {"train", "eval", "mnist", "all", "demo", "test", "dev", "docs", "trackers"} <= extras


def test_installation_without_a_compiler(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    record = json.loads((tmp_path / "pecker_fast" / "_build.json").read_text())
    assert "no C++ compiler" in record["cpu"]
    code = (
        "import torch, pecker_fast as pf\n"
        "from pecker_fast import kernels, benchmarks\n"
        f"assert pf.__file__.startswith({str(tmp_path)!r})\n"
        "mask = pf.saliency_mask([torch.randn(100)], density=0.5)\n"
        "assert mask.count == 50\n"
        "try:\n    pf.saliency_mask([torch.randn(9)], density=0.5, backend='cpu')\n"
        "except RuntimeError as error:\n    assert 'no C++ compiler' in str(error)\n"
        "else:\n    raise AssertionError('the missing back end ran')\n"
        "for name in ('kernels', 'benchmarks'):\n"
        "    try:\n        __import__(name)\n"
        "    except ModuleNotFoundError:\n        continue\n"
        "    raise AssertionError(name + ' is importable')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
