"""The examples of the documentation run, its commands can be parsed, and the files that it names exist."""

import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import pecker_fast as pf
from pecker_fast.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (name, block)
    for name in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
]
_unlearn = pf.unlearn


def test_examples_exist():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_example_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The documented call with few iterations and samples: it must work, its figures do not matter.
    short = {"max_train_steps": 2, "samples_per_class": 4, "progress_bar": False}
    monkeypatch.setattr(pf, "unlearn", lambda *args, **options: _unlearn(*args, **{**options, **short}), raising=False)
    exec(compile(block, name, "exec"), {"__name__": "__main__"})


def test_documented_files_exist():
    for name in PAGES:
        for path in re.findall(
            r"`((?:pecker_fast|tests|csrc|kernels|benchmarks)/[\w/]+\.\w+)`", (ROOT / name).read_text()
        ):
            assert (ROOT / path).exists(), f"{name} names {path}"


def commands() -> list[tuple[str, str]]:
    """Commands in code blocks and in the text, each with its page."""
    result = set()
    for name in PAGES:
        text = (ROOT / name).read_text().replace("\\\n", " ")
        lines = re.findall(r"^ {4}((?:pecker-fast|python -m|make) .*)$", text, re.MULTILINE)
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            lines += re.findall(r"^((?:pecker-fast|python -m|make) .*)$", block, re.MULTILINE)
        lines += re.findall(r"`((?:pecker-fast|make) [^`]+)`", text)
        result |= {(name, " ".join(re.split(r"\s#\s", line)[0].split())) for line in lines}
    return sorted(result)


@pytest.mark.parametrize(("page", "command"), commands())
def test_command_is_parsed(page, command, tmp_path, monkeypatch, capsys):
    """Parses the command with its options; the folders in it need not exist, but a file of options is read."""
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command.removesuffix(" ..."))
    if "--config" in words:
        path = Path(words[words.index("--config") + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    if program == "make":
        targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= {name for row in targets for name in row.split()}
    elif program == "python":
        assert find_spec(words[1]) is not None, words[1]
    elif words[0].startswith("-"):
        assert words[0] in ("--help", "--version")
    else:
        assert words[0] in COMMANDS
        if len(words) == 1 or {"NAME", "FILE"} & {*words[2:]}:
            return  # the command by its name, or an option of it
        parse = importlib.import_module(f"pecker_fast.commands.{words[0].replace('-', '_')}").parse
        try:
            parse(words[1:])
        except SystemExit as stop:
            assert stop.code in (0, None) and {"--help", "--help_all"} & {*words}, capsys.readouterr().err
