"""The examples of the documentation run, its commands can be parsed, and the files that it names exist.

``make docs-check`` runs the commands; here it is tested that it leaves none out.
"""

import re
from pathlib import Path

import pytest

import pecker_fast as pf
from pecker_fast.cli import COMMANDS
from tests import docs_check
from tests.documented import PAGES, ROOT, Documented, blocks, documented, in_help, on_page

BLOCKS = [
    (name, block)
    for name in PAGES
    for language, block in blocks((ROOT / name).read_text(encoding="utf-8"))
    if language == "python"
]
ON_PAGES = [item for name in PAGES for item in on_page(name) if item.kind != "python"]
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


@pytest.mark.parametrize("item", ON_PAGES, ids=lambda item: f"{item.page}-{item.text}")
def test_command_is_parsed(item, tmp_path, monkeypatch):
    """Parses the command with its options; the folders in it need not exist, but a file of options is read."""
    monkeypatch.chdir(tmp_path)
    words = item.words
    if "--config" in words:
        path = Path(words[words.index("--config") + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    docs_check.parse(item, asks=False)


def test_no_command_of_a_page_is_overlooked():
    """Compared with plain searches for lines and quotations that begin with a program, and with lines that have one."""
    program = r"(?:pecker-fast|python|make|torchrun|pip)"
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(rf"^ {{4}}(?:[A-Z_]+=\S+ )?({program} \S.*)$", text, re.MULTILINE)
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            lines += re.findall(rf"^({program} \S.*)$", block, re.MULTILINE)
        lines += re.findall(r"`((?:pecker-fast|make|torchrun|pip) [^`]+)`", text)
        found = " | ".join(item.text for item in on_page(name))
        for line in lines:
            assert " ".join(re.split(r"\s#\s", line)[0].split()) in found, (name, line)
    # Read by a person.
    readme = [item.text for item in on_page("README.md")]
    assert readme[0] == 'pip install --no-build-isolation ".[train]"' and "make demo" in readme
    assert "pecker-fast report runs/digits-pecker-seed0" in readme and "pecker-fast env" in readme
    assert sum(item.kind == "python" for item in on_page("README.md")) == 2
    (wandb,) = (item for item in on_page("docs/training.md") if "wandb" in item.text and item.kind == "block")
    assert wandb.words[:2] == ["pecker-fast", "unlearn"]
    helped = in_help()
    assert {item.page.split()[1] for item in helped if len(item.page.split()) > 2} == {*COMMANDS}
    assert all(item.text.startswith("pecker-fast ") for item in helped)


def test_everything_is_run_or_has_a_reason():
    items = documented()
    ran = [item for item in items if docs_check.why_parsed(item) is None]
    for item in ran:
        script = item.kind == "python" or item.words[:2] == ["python", "-m"] or item.words[0] == "pecker-fast"
        assert script or item.words[0] in docs_check.TOOLS or (ROOT / item.words[1]).is_file(), item
    assert len(ran) > 0.7 * sum(item.kind != "quoted" for item in items)
    # No rule is left over from a command that is not documented any more.
    texts = [item.text.removeprefix("WANDB_MODE=offline ") for item in items if item.kind != "python"]
    for pattern, _ in (*docs_check.PARSED, *docs_check.APPENDED, *((fresh, "") for fresh in docs_check.FRESH)):
        assert any(re.match(pattern, text) for text in texts), pattern
    assert {*docs_check.FRAGMENTS, *docs_check.FOLDERS, *docs_check.NAMES_ON_PAGES} <= {item.page for item in items}
    words = {word for item in items if item.kind != "python" for word in item.words}
    assert {*docs_check.NAMES} <= words


def test_check_reports_what_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def checked(text: str, kind: str = "block") -> docs_check.Result:
        return docs_check.check(Documented("page", text, kind))

    assert "no option --densty" in checked("pecker-fast unlearn --densty 0.3").error
    assert "no such folder" in checked("pecker-fast report runs/nowhere").error
    assert "ZeroDivisionError" in checked("1 / 0", "python").error
    assert checked("make no-such-target").error and checked("pip install '.[no-such-extra]'").error
    assert checked("torchrun --nproc_per_node 4 -m pecker_fast unlearn --no_such_option").error
    for text in ("pecker-fast --version", "pecker-fast unlearn --help", "make docs-check", "pip install '.[train]'"):
        assert checked(text).error is None, text
    assert checked("pecker-fast --version").reason is None and checked("make test").reason
    results = docs_check.check_all([Documented("a", "pecker-fast report nowhere", "block")] * 2)
    assert len(results) == 1 and "FAILED" in capsys.readouterr().out
