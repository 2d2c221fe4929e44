"""Everything in the documentation that a reader may type: commands, Python blocks and the examples of ``--help``."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pecker_fast.cli import COMMANDS, main
from pecker_fast.commands.patch import ACTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*.md"))
# A line of a code block that starts so is a command; variables of the environment may come before it.
PROGRAMS = ("pecker-fast", "python", "make", "pip", "torchrun")
_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) \S")
# In a sentence, a command of its own is more than a name: `make test`, `pecker-fast report RUN`.
_QUOTED = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`")


@dataclass(frozen=True)
class Documented:
    """Something that a reader may type.

    Parameters
    ----------
    page : str
        Where it stands: a file, or the help of a command.
    text : str
        The command in one line, or the source of a Python block.
    kind : {"block", "quoted", "python"}
        A command in a block of its own, one in a sentence, or Python.
    """

    page: str
    text: str
    kind: str

    @property
    def words(self) -> list[str]:
        """The words of a command, without variables of the environment and without the dots of one that goes on."""
        words = shlex.split(self.text.removesuffix(" ..."))
        while "=" in words[0]:
            del words[0]
        return words


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The code blocks of a page as (language, source); those that are indented have no language."""
    lines, i = text.splitlines(), 0
    while i < len(lines):
        if lines[i].startswith("```"):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith("```"))
            yield lines[i][3:].strip(), "\n".join(lines[i + 1 : end])
            i = end + 1
        elif lines[i].startswith("    ") and not lines[i - 1].strip():
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            source = "\n".join(line[4:] for line in lines[i:end]).strip("\n")
            yield "", source
            i = end
        else:
            i += 1


def commands_of(source: str) -> list[str]:
    """The commands of a block, each in one line without its comment; empty if the block is no list of commands."""
    lines = source.replace("\\\n", " ").splitlines()
    if not lines or not _COMMAND.match(lines[0]):
        return []
    return [line for line in (without_comment(line) for line in lines) if line]


def without_comment(line: str) -> str:
    """A command with single blanks, without a comment."""
    return " ".join(re.split(r"(?:^|\s)#\s", line)[0].split())


def is_python(source: str) -> bool:
    """Whether a block without a language is Python, rather than a listing or an equation."""
    try:
        compile(source, "block", "exec")
    except SyntaxError:
        return False
    return "(" in source


def on_page(name: str) -> list[Documented]:
    """What a reader of a page may type, in its order; a command that stands there twice counts once."""
    text = (ROOT / name).read_text(encoding="utf-8")
    result = []
    for language, source in blocks(text):
        if language == "python" or (not language and not commands_of(source) and is_python(source)):
            result.append(Documented(name, source, "python"))
        else:
            result += [Documented(name, command, "block") for command in commands_of(source)]
    result += [Documented(name, " ".join(quoted.split()), "quoted") for quoted in _QUOTED.findall(text)]
    return list(dict.fromkeys(result))


def in_help() -> list[Documented]:
    """The examples at the end of the help of every command."""
    result = []
    for words in ([], *([name] for name in COMMANDS), *(["patch", action] for action in ACTIONS)):
        for line in help_text(words).partition("\nexamples:\n")[2].splitlines():
            result.append(Documented(shlex.join(["pecker-fast", *words, "--help"]), line.strip(), "block"))
    return result


def help_text(words: Sequence[str], option: str = "--help") -> str:
    """What a command's help prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*words, option])
    return text.getvalue()


def documented() -> list[Documented]:
    """All of it: page by page, then the help. The same command on several pages is listed for each."""
    return [item for name in PAGES for item in on_page(name)] + in_help()
