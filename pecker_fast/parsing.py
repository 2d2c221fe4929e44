"""The parser of the command line: options of dataclasses and functions, help in two lengths, plain errors."""

import argparse
import dataclasses
import json
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser

from .names import nearest
from .options import REQUIRED, Option, UsageError, options_of, parameters, text_of, with_values
from .records import unique

T = TypeVar("T")
HELP, HELP_ALL = ("-h", "--help"), ("--help_all", "--help-all")
CONFIG = "config"


def early_option(words: Sequence[str], name: str) -> str | None:
    """The value of an option that decides which other options there are; None if it is not set.

    The command line comes before the file of ``--config``.

    Raises
    ------
    UsageError
        If there is no such file.
    """
    value = _last_value(words, name)
    if value is None and name != CONFIG:
        path = _last_value(words, CONFIG)
        config = {} if path is None else read_config(path)
        # A run's config.json has groups.
        places = [config, *(group for group in config.values() if isinstance(group, dict))]
        value = next((place[name] for place in places if name in place), None)
    return None if value is None else str(value)


def _last_value(words: Sequence[str], name: str) -> str | None:
    value = None
    for i, word in enumerate(words):
        option, equals, rest = word.partition("=")
        if option.replace("-", "_") == f"__{name}":
            value = rest if equals else _next(list(words[i + 1 :]), name)
    return value


def read_config(path: str) -> dict[str, Any]:
    """A file of options: JSON if its name ends with .json, otherwise YAML.

    Raises
    ------
    UsageError
        If it cannot be read, or is no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"config is {path!r}, which cannot be read: {error}") from error
    if path.endswith(".json"):
        try:
            values = json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"config is {path!r}, which is no JSON: {error}") from error
    else:
        try:
            import yaml
        except ImportError as error:
            raise UsageError(f"config is {path!r}: pip install pyyaml to read it, or write JSON") from error

        class Loader(yaml.SafeLoader):
            def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
                # PyYAML takes the last value of a key that occurs twice.
                unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
                return super().construct_mapping(node, deep)

        try:
            values = yaml.load(text, Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"config is {path!r}, which is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"config is {path!r}, expected options with their values (name: value)")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def parse_options(
    default: T,
    words: Sequence[str],
    command: str,
    description: str,
    *,
    basic: Collection[str] | None = None,
    positional: Mapping[str, str] | None = None,
    titles: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    examples: Sequence[str] = (),
    program: str = "pecker-fast",
    commas: bool = True,
) -> T:
    """Parse words of the command line into options.

    Parameters
    ----------
    default : dataclass
        The defaults; fields that are dataclasses are groups of options. The default of a required option is
        ``REQUIRED``.
    words : sequence of str
        What follows the command.
    command, description : str
        Its name, and the first lines of its help.
    basic : collection of str, optional
        The options that ``--help`` shows; ``--help_all`` shows all. Default: all.
    positional : Mapping, optional
        Options that may also be given by their place, in this order, and what the help calls them. A list takes the
        places that are left.
    titles : Mapping, optional
        Group to its title in the help. Default: its name.
    aliases : Mapping, optional
        Option to a second name, such as "preset_name".
    config : callable, optional
        Makes the values of a file that ``--config`` names into options by name. None: there is no ``--config``.
    examples : sequence of str
        What the help ends with: what follows the name of the command.
    program : str
        What comes before the command.
    commas : bool
        Whether commas separate the items of a list as blanks do.

    Returns
    -------
    dataclass
        Of the type of ``default``.

    Raises
    ------
    UsageError
        If a word is wrong: a line that names the option and what is allowed.
    SystemExit
        With status 0 after help.
    """
    places, aliases = positional or {}, aliases or {}
    options = {option.name: option for option in options_of(default, titles or {})}
    wants_all = any(word in HELP_ALL for word in words)
    if wants_all or any(word in HELP for word in words):
        shown = options.keys() if wants_all or basic is None else basic
        name = f"{program} {command}".strip()
        texts = (description, f" All options: {HELP_ALL[0]}." if basic is not None else "", config is not None)
        print(_help(name, texts, options, shown, places, aliases, examples), end="")
        raise SystemExit(0)
    try:
        return with_values(default, _values(words, options, places, aliases, command, config, commas))
    except UsageError as error:
        error.command = command
        raise


def _values(
    words: Sequence[str],
    options: Mapping[str, Option],
    places: Mapping[str, str],
    aliases: Mapping[str, str],
    command: str,
    config: Callable[[dict[str, Any]], dict[str, Any]] | None,
    commas: bool,
) -> dict[str, Any]:
    """The values of the options that are set, in a file or by words."""
    values: dict[str, Any] = {}
    path = _last_value(words, CONFIG) if config is not None else None
    if path is not None:
        for key, value in config(read_config(path)).items():
            if key not in options:
                near = nearest(key, options)
                raise UsageError(f"config {path} has {key!r}, which is no option of {command}{near}")
            texts = [text_of(item, options[key]) for item in (value if isinstance(value, (list, tuple)) else [value])]
            if len(texts) != 1 and not options[key].is_list:
                raise UsageError(f"{key} is {value!r}, expected one value")
            values[key] = options[key].convert(texts, split=False)
    values |= _parse(words, options, places, {other: name for name, other in aliases.items()}, command, config, commas)
    for name, option in options.items():
        if option.default is REQUIRED and name not in values:
            raise UsageError(f"{places.get(name, name)} is missing")
    return values


def parse_call(function: Callable[..., T], words: Sequence[str], command: str, **options: Any) -> Callable[[], T]:
    """Parse words of the command line into a call of ``function``.

    Parameters
    ----------
    function : callable
        Its parameters are the options, and its docstring describes them.
    words, command
        As for ``parse_options``; ``options``: further arguments of it.

    Returns
    -------
    callable
        Without parameters: parsing and running fail in different ways.
    """
    document = docstring_parser.parse(function.__doc__ or "")
    hints, fields = typing.get_type_hints(function), []
    for name, parameter in signature(function).parameters.items():
        value = REQUIRED if parameter.default is Parameter.empty else parameter.default
        fields.append((name, hints[name], dataclasses.field(default=value)))
    kind = dataclasses.make_dataclass(function.__name__, fields, namespace={"_helps": parameters(document)})
    text = " ".join(part for part in (document.short_description, document.long_description) if part)
    parsed = parse_options(kind(), words, command, text, **options)
    return lambda: function(**{name: getattr(parsed, name) for name, *_ in fields})


def _parse(
    words: Sequence[str],
    options: Mapping[str, Option],
    places: Mapping[str, str],
    aliases: Mapping[str, str],
    command: str,
    config: Any,
    commas: bool,
) -> dict[str, Any]:
    """The values of all options that words set; the last one counts."""
    texts: dict[str, list[str]] = {}
    loose: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            loose.append(word)
            continue
        written, equals, value = word.partition("=")
        name = written.removeprefix("--").replace("-", "_")
        name = aliases.get(name, name)
        negated = name.removeprefix("no_")
        if name == CONFIG and config is not None:
            if not equals:
                _next(rest, name)
        elif name in options:
            option = options[name]
            if option.is_flag and option.is_optional and not equals and rest and rest[0] in ("True", "False", "None"):
                # As earlier versions took it.
                texts[name] = [rest.pop(0)]
            elif equals or option.is_flag:
                texts[name] = [value if equals else "yes"]
            elif option.is_list:
                texts[name] = []
                while rest and not rest[0].startswith("--"):
                    texts[name].append(rest.pop(0))
            else:
                texts[name] = [_next(rest, name)]
        elif negated in options and options[negated].is_flag and not equals:
            texts[negated] = ["no"]
        else:
            known = [*options, *aliases, *([CONFIG] if config is not None else [])]
            raise UsageError(f"there is no option {written}{nearest(name, known, prefix='--')}")
    for name, shown in places.items():
        several = options[name].is_list
        here, loose = (loose, []) if several else (loose[:1], loose[1:])
        if here and name in texts:
            raise UsageError(f"{name} is {' '.join(texts[name])!r}, but {shown} is given as well: expected one of them")
        if here:
            texts[name] = here
    if loose:
        takes = " ".join(places.values()) or "options only"
        raise UsageError(f"{loose[0]!r} is unexpected: {command} takes {takes}")
    return {name: options[name].convert(value, split=commas) for name, value in texts.items()}


def _next(rest: list[str], name: str) -> str:
    """The next word, which is the value of an option."""
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{name} has no value")
    return rest.pop(0)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """A narrow column of options: what they mean takes fewer lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=27, width=shutil.get_terminal_size().columns)


def _help(
    name: str,
    texts: tuple[str, str, bool],
    options: Mapping[str, Option],
    shown: Collection[str],
    places: Mapping[str, str],
    aliases: Mapping[str, str],
    examples: Sequence[str],
) -> str:
    """The help of a command, in the layout of argparse."""
    description, more, has_config = texts
    words = []
    for option, place in places.items():
        word = f"{place} ..." if options[option].is_list else place
        words.append(word if options[option].default is REQUIRED else f"[{word}]")
    parser = argparse.ArgumentParser(
        name,
        usage=" ".join([name, *words, "[OPTIONS]"]),
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
    )
    # Python 3.14 has colours of its own.
    parser.color = False  # type: ignore[attr-defined]
    width = parser._get_formatter()._width
    parser.description = textwrap.fill(" ".join(description.split()) + more, width)
    if examples:
        parser.epilog = "\n".join(["examples:", *(f"  {name} {example}".rstrip() for example in examples)])
    groups: dict[str, Any] = {}
    if places:
        groups["arguments"] = parser.add_argument_group("arguments")
    if has_config:
        groups["options"] = parser.add_argument_group("options")
        text = "options from YAML, JSON or a run's config.json"
        groups["options"].add_argument(f"--{CONFIG}", metavar="FILE", help=text)
    for option in options.values():
        text = " ".join(filter(None, [option.text, option.usual and f"(default: {option.usual})"]))
        text = text.replace("%", "%%")
        if option.name in places:
            groups["arguments"].add_argument(places[option.name], help=text)
            continue
        if option.name not in shown:
            continue
        if option.title not in groups:
            groups[option.title] = parser.add_argument_group(option.title)
        group = groups[option.title]
        names = [f"--{option.name}", *([f"--{aliases[option.name]}"] if option.name in aliases else [])]
        if option.is_flag:
            # The one that changes something.
            negated = [f"--no-{option.name}"] if option.default is not False else []
            group.add_argument(*names, *negated, action="store_true", help=text)
        else:
            group.add_argument(*names, metavar=option.metavar, help=text)
    # One blank line above the options, and none between their groups, whose titles stand out.
    head, blank, options_text = parser.format_help().partition("\n\noptions:\n")
    return head + blank + re.sub(r"\n\n(?=\S[^\n]* options:\n)", "\n", options_text)
