"""The parser of the command line: options of dataclasses and functions, help in two lengths, errors in one line."""

import contextlib
import dataclasses
import functools
import io
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Sequence
from inspect import Parameter, signature
from typing import Annotated, Any, TypeVar

import docstring_parser
import tyro

T = TypeVar("T")
HELP, HELP_ALL = ("-h", "--help"), ("--help_all", "--help-all")


def early_option(words: Sequence[str], name: str) -> str | None:
    """The value of an option that decides which other options there are; None if it is not set."""
    value = None
    for i, word in enumerate(words):
        option, equals, rest = word.partition("=")
        if option.replace("-", "_") == f"__{name}":
            value = rest if equals else next(iter(words[i + 1 : i + 2]), None)
    return value


def option_names(words: Sequence[str]) -> set[str]:
    """The names of the options that are set."""
    names = (word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--"))
    return {name.removeprefix("no_") for name in names} | set(names)


def parse_options(
    default: T,
    words: Sequence[str],
    command: str,
    description: str,
    *,
    basic: Collection[str] | None = None,
    positional: str | None = None,
    titles: dict[str, str] | None = None,
    aliases: dict[str, str] | None = None,
) -> T:
    """Parse words of the command line into options.

    Parameters
    ----------
    default : dataclass
        The defaults; fields that are dataclasses are groups of options. A required option is ``tyro.MISSING``.
    words : sequence of str
        What follows the command.
    command, description : str
        Its name, and the first lines of its help.
    basic : collection of str, optional
        The options that ``--help`` shows; ``--help_all`` shows all. Default: all.
    positional : str, optional
        An option that is given by its place.
    titles : dict, optional
        Group to its title in the help. Default: its name.
    aliases : dict, optional
        Option to a second name, such as "--preset_name".

    Returns
    -------
    dataclass
        Of the type of ``default``.

    Raises
    ------
    SystemExit
        With status 0 after help, and 2 after a line that says what is wrong.
    """
    wants_all = any(word in HELP_ALL for word in words)
    wants_help = wants_all or any(word in HELP for word in words)
    shown = basic if basic is not None and wants_help and not wants_all else None
    if basic is not None:
        description += " All options: --help_all."
    description = textwrap.fill(" ".join(description.split()), shutil.get_terminal_size().columns)

    def item(group: Any, field: dataclasses.Field, hints: dict[str, Any], helps: dict[str, str]) -> tuple:
        name, text = field.name, helps.get(field.name)
        # A place has no default, and the text may say what None stands for.
        silent = name == positional or (text is not None and "Default: " in text and getattr(group, name) is None)
        other = (aliases or {}).get(name)
        hint = "" if silent else None
        texts: dict[str, Any] = {"help": text, "help_behavior_hint": hint, "aliases": other and (other,)}
        markers: list[Any] = [tyro.conf.arg(**texts)]
        if name == positional:
            markers = [tyro.conf.Positional, tyro.conf.arg(**texts, metavar=name.upper())]
        elif shown is not None and name not in shown:
            markers.append(tyro.conf.Suppress)
        return name, Annotated[(hints[name], *markers)], dataclasses.field(default=getattr(group, name))

    def mirror(group: Any) -> type:
        """A class with the same options, whose annotations say how each is shown."""
        kind = type(group)
        hints, helps, own, groups = typing.get_type_hints(kind), _helps(kind), [], []
        for field in dataclasses.fields(kind):
            value = getattr(group, field.name)
            if dataclasses.is_dataclass(value):
                inner = mirror(value)
                title = (titles or {}).get(field.name, field.name)
                # With a help text, tyro does not look for one in the source of the class, which has none.
                groups.append(
                    (title, Annotated[inner, tyro.conf.arg(help="")], dataclasses.field(default_factory=inner))
                )
            else:
                own.append(item(group, field, hints, helps))
        return dataclasses.make_dataclass(kind.__name__, [*own, *groups], kw_only=True)

    def restore(group: T, parsed: Any) -> T:
        changes = {}
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if dataclasses.is_dataclass(value):
                changes[field.name] = restore(value, getattr(parsed, (titles or {}).get(field.name, field.name)))
            else:
                changes[field.name] = getattr(parsed, field.name)
        return dataclasses.replace(group, **changes)

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = tyro.cli(
                mirror(default),
                prog=f"pecker-fast {command}",
                description=description,
                args=["--help"] if wants_help else list(words),
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code == 2:
            print(f"pecker-fast: {_one_line(stderr.getvalue())} (see pecker-fast {command} --help)", file=sys.stderr)
        raise
    return restore(default, parsed)


def parse_call(
    function: Callable[..., T], words: Sequence[str], command: str, *, positional: str | None = None, **options: Any
) -> Callable[[], T]:
    """Parse words of the command line into a call of ``function``.

    Parameters
    ----------
    function : callable
        Its parameters are the options, and its docstring describes them.
    words, command, positional
        As for ``parse_options``; ``options``: further arguments of it.

    Returns
    -------
    callable
        Without parameters: parsing and running fail in different ways.
    """
    document = docstring_parser.parse(function.__doc__ or "")
    helps, hints = _parameters(document), typing.get_type_hints(function)
    fields = []
    for name, parameter in signature(function).parameters.items():
        value = tyro.MISSING if parameter.default is Parameter.empty else parameter.default
        fields.append((name, hints[name], dataclasses.field(default=value)))
    kind = dataclasses.make_dataclass(function.__name__, fields, namespace={"_helps": helps})
    text = " ".join(part for part in (document.short_description, document.long_description) if part)
    parsed = parse_options(kind(), words, command, text, positional=positional, **options)
    values = {
        name: getattr(parsed, name) for name in helps.keys() | {field[0] for field in fields} if hasattr(parsed, name)
    }
    return lambda: function(**values)


def _helps(kind: type) -> dict[str, str]:
    """Option to its help: the docstrings below the fields, or those of a function's parameters."""
    return kind._helps if hasattr(kind, "_helps") else _documented(kind)


@functools.cache
def _documented(kind: type) -> dict[str, str]:
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        helps |= _parameters(docstring_parser.parse_from_object(base))
    return helps


def _parameters(document: docstring_parser.Docstring) -> dict[str, str]:
    return {
        param.arg_name: " ".join(param.description.split())
        for param in document.params
        if param.description is not None
    }


def _one_line(text: str) -> str:
    """The message of tyro about wrong arguments: without its title, its box, and the hints below it."""
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        words = line.strip().strip("│").strip()
        if words and not words.strip("─-"):
            sections.append([])
        elif words and not words.startswith(("╭", "╰")):
            sections[-1].append(words)
    # In ASCII the title is a section of its own; otherwise it is in the border.
    message = sections[0] if "╭" in text else sections[min(1, len(sections) - 1)]
    return " ".join(message) or "wrong arguments"
