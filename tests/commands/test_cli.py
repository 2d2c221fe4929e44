"""The command line as a user meets it."""

import importlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pecker_fast
from pecker_fast.benchmarks import memory
from pecker_fast.cli import COMMANDS, main
from pecker_fast.commands.patch import ACTIONS
from tests import processes
from tests.commands.case import ROOT, fails


def test_env_prints_versions_and_reasons(capsys):
    # In a separate process, as a user runs it, without the Triton interpreter that the other tests enable.
    process = processes.run(["-m", "pecker_fast", "env", "--json"])
    facts = json.loads(process.stdout)
    assert facts["backends"]["cpu"]["reference"] is None
    assert facts["backends"]["cpu"]["cuda"]
    assert set(facts["chosen"]["cpu"].values()) <= {"cpu", "reference"}
    main(["env"])
    text = capsys.readouterr().out
    assert "torch" in text and "reference" in text and "chosen" in text


def test_bench_writes_json(tmp_path, capsys, monkeypatch):
    def measured(command: list[str], **options) -> subprocess.CompletedProcess:
        """The benchmark takes a fresh interpreter for each figure of memory; a fork is as good here."""
        return processes.run(command[1:], env=options["env"])

    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=measured))
    path = tmp_path / "out.json"
    # All operations run in the tests of the benchmarks.
    names = ["saliency_mask_memory", "masked_adam"]
    quick = ["--size", "tiny", "--threads", "1", "--repeats", "3", "--max-seconds", "0.05"]
    main(["bench", *names, *quick, "--json", str(path)])
    results = json.loads(path.read_text())
    assert {row["op"] for row in results["rows"]} == {*names} and {"conditions", "rows"} <= set(results)
    assert results["conditions"]["packages"]["torch"]
    for row in results["rows"]:
        assert row["number"] >= 0
    out = capsys.readouterr().out
    assert all(row["figure"] in out for row in results["rows"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["demo", "--forget-class", "12", "--output-dir", "/tmp/never-written"],
        ["unlearn", "--preset", "no-such-preset"],
        ["unlearn", "--method", "no-such-method"],
        ["unlearn", "--density", "much"],
        ["unlearn", "--no_such_option"],
        ["bench", "no_such_operation", "--size", "tiny"],
        ["bench", "--size", "gigantic"],
        ["bench", "--size", "tiny", "--json", "/no/such/folder/out.json"],
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, monkeypatch, arguments):
    # Otherwise bench would report that Triton is interpreted.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name = f"pecker-fast {arguments[0]}" if arguments[:1] not in ([], ["nonsense"]) else "pecker-fast"
    assert fails(capsys, *arguments).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("unlern", r"no command 'unlern', expected one of demo, .*; the nearest is 'unlearn' \(see pecker-fast --help"),
        ("unlearn --densty 0.3", r"no option --densty; the nearest is '--density' \(see pecker-fast unlearn --help"),
        ("unlearn --density much", r"density is 'much', expected a number \(see pecker-fast unlearn --help"),
        ("unlearn --density", r"density has no value"),
        ("unlearn --config --density 0.1", r"config has no value"),
        ("unlearn --preset --density 0.1", r"preset has no value"),
        ("unlearn --seed 1.5", r"seed is '1.5', expected an integer"),
        ("unlearn --seed -1 --dry_run", r"seed is -1, expected at least 0 \(see pecker-fast unlearn --help"),
        ("unlearn --preset digit", r"preset is 'digit', expected one of digits, .*; the nearest is 'digits'"),
        ("unlearn --method salum", r"method is 'salum', expected one of esd, .*; the nearest is 'salun'"),
        ("unlearn --variance combine", r"variance is 'combine', expected one of combined, retain; the nearest"),
        ("unlearn runs/a", r"'runs/a' is unexpected: unlearn takes options only"),
        ("report", r"RUN is missing \(see pecker-fast report --help"),
        ("report a b", r"'b' is unexpected: report takes RUN"),
        ("sample a --pretrained_model_name_or_path b", r"is 'b', but RUN is given as well: expected one of them"),
        ("patch mak a", r"there is no action 'mak', expected one of make, .*; the nearest is 'make'"),
        ("patch make a --outputs b", r"no option --outputs; .*'--output' \(see pecker-fast patch make --help"),
    ],
)
def test_errors_name_the_option_what_is_allowed_and_the_nearest(capsys, words, message):
    line = fails(capsys, *words.split())
    assert re.search(message, line), line
    assert line.startswith("pecker-fast: " if words == "unlern" else f"pecker-fast {words.split()[0]}: ")


def test_messages_are_plain(capsys, monkeypatch):
    """Whatever a library says: one line without colours, boxes and control characters."""

    def explode() -> None:
        raise RuntimeError("\x1b[31m╭─ Error ─╮\x1b[0m\n│ density\tis wrong │\r\n\x07in many lines")

    module = SimpleNamespace(parse=lambda words: explode)
    monkeypatch.setattr("pecker_fast.cli.importlib.import_module", lambda *names: module)
    assert fails(capsys, "env") == "pecker-fast env: Error density is wrong in many lines"


def help_of(capsys, *words: str, option: str = "--help") -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, option])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_help_ends_with_examples_that_can_be_parsed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine", "runs/distilled"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").write_text("{}")
    for words in ([], *([name] for name in COMMANDS), *(["patch", action] for action in ACTIONS)):
        examples = help_of(capsys, *words).partition("\nexamples:\n")[2].splitlines()
        assert examples, words
        for example in examples:
            program, command, *rest = shlex.split(example)
            assert program == "pecker-fast" and command in (COMMANDS if not words else words[:1])
            importlib.import_module(f"pecker_fast.commands.{command.replace('-', '_')}").parse(rest)


def test_help_is_plain(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for words in ([], *([name] for name in COMMANDS)):
        text = help_of(capsys, *words, option="--help_all")
        wrong = r"[\x1b\u2500-\u257f]|\{None\}|\bSTR\b|default: \)|options options|default: None"
        assert not re.search(wrong, text), words


def terminal(
    command: list[str], environment: dict[str, str], until: str = "", then: int = 0, cwd: Path = ROOT
) -> tuple[str, int]:
    """Run ``python COMMAND`` on a pseudo-terminal; return what it wrote, and its exit status.

    When ``until`` has been written, the signal ``then`` is sent.
    """
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=cwd,
        env={**os.environ, **environment},
        # Whoever started the tests in the background made them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(follower)
    text = b""
    try:
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:
                # The other end is closed: the process has ended.
                break
            text += part
            if not part:
                break
            if then and until.encode() in text:
                process.send_signal(then)
                then = 0
        return text.decode(), process.wait(timeout=300)
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def lines_on(text: str) -> list[str]:
    """The lines that a terminal shows: after a carriage return, text takes the place of what is there."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


def test_a_terminal_shows_a_notice_at_once_and_then_one_plain_line():
    environment = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-256color"}
    text, status = terminal(["-m", "pecker_fast", "unlearn", "--densty", "0.3"], environment)
    assert status == 2 and "\x1b" not in text and text.startswith("pecker-fast unlearn: loading ...")
    message = "there is no option --densty; the nearest is '--density' (see pecker-fast unlearn --help)"
    assert lines_on(text) == [f"pecker-fast unlearn: {message}"]


def test_the_notice_comes_before_torch():
    for start in ("sys.argv[0] = '/usr/bin/pecker-fast'", "sys.orig_argv[1:] = ['-m', 'pecker_fast', 'env']"):
        code = f"import sys; {start}; import pecker_fast.cli; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    # What is not imported at first is found when it is used.
    for name in pecker_fast.__all__:
        assert pecker_fast.__getattr__(name) is getattr(pecker_fast, name)


def test_ctrl_c_while_libraries_are_loaded(tmp_path):
    # If it were not noticed, there is no such network.
    words = ["-m", "pecker_fast", "unlearn", "--pretrained_model_name_or_path", str(tmp_path / "none")]
    text, status = terminal(words, {}, until="loading ...", then=signal.SIGINT, cwd=tmp_path)
    assert status == 130 and "Traceback" not in text, text


def test_a_pipe_gets_one_plain_line_and_may_be_closed():
    command = [sys.executable, "-m", "pecker_fast", "unlearn", "--density", "much"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    lines = [line for line in process.stderr.splitlines() if "CUDA runtime" not in line]
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("pecker-fast unlearn: "), process.stderr
    # A reader that is gone before the help is written, as head may be.
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pecker_fast", "--help"]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=300)
    os.close(writer)
    lines = [line for line in process.stderr.splitlines() if "CUDA runtime" not in line]
    assert process.returncode == 141 and lines == []


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "<&- 1>&- 2>&-"])
def test_closed_streams(closed):
    """As of processes that a daemon starts."""
    line = f"exec {shlex.quote(sys.executable)} -m pecker_fast --version {closed}"
    result = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == ("" if "1>" in closed else f"pecker-fast {pecker_fast.__version__}\n")
