"""Which tests run where: continuous integration runs the slow ones, too, and no file has slow tests alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = "pytest.mark.slow"
FILES = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if SLOW in path.read_text()]


def selections() -> dict[str, str]:
    """The expression of markers of each target of the Makefile that runs the tests; an empty one selects all."""
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r'^(test.*): \$\(STAMP\)\n\t.* -m pytest -m "\$\(SELECTED\)" ', makefile, re.MULTILINE)
    chosen = dict(re.findall(r"^(test[a-z-]*): SELECTED = (.+)$", makefile, re.MULTILINE))
    return {name: chosen.get(name, "") for name in targets.split()}


def test_targets_of_the_makefile():
    assert selections() == {"test": "not slow", "test-slow": "slow", "test-all": "", "test-random": ""}


def test_continuous_integration_runs_every_test():
    targets = re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "lint" in targets and {selections()[name] for name in targets if name != "lint"} == {"slow", "not slow"}


def test_pytest_alone_runs_every_test(pytestconfig):
    assert "-m" not in pytestconfig.getini("addopts")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_has_slow_tests_alone(path):
    tree = ast.parse(path.read_text())
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert any(SLOW not in map(ast.unparse, test.decorator_list) for test in tests)
    marks = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    assert not any(line.startswith("pytestmark") and SLOW in line for line in marks)
