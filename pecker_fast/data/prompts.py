"""Prompts of concepts: lists that come with the package, files of the user, and pairs of forget prompts and covers.

The package's lists are in ``assets/prompts``, one prompt per line. Training and evaluation use different lists; the
public code of SFD evaluates on its training prompts, and so does ``protocol="paper"``.
"""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from ..checks import check_choice
from .prompt_tables import is_table, read_table

TASKS = ("celebrity", "nudity")
PROTOCOLS = ("disjoint", "paper")
CONCEPT = "{concept}"
# Default covers of celebrities (SFD, arXiv 2409.11219), by the list that has the name.
COVERS = {"celebrity-men": "a middle aged man", "celebrity-women": "a middle aged woman"}

Protocol = Literal["disjoint", "paper"]


@dataclass(frozen=True)
class PromptPairs:
    """Prompts to forget, each with a cover prompt that replaces it.

    Parameters
    ----------
    forget : tuple of str
        Prompts to forget.
    cover : tuple of str
        A cover for each.

    Raises
    ------
    ValueError
        If there are no prompts, their number is not that of the covers, or a prompt is its own cover.
    """

    forget: tuple[str, ...]
    cover: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.forget or len(self.forget) != len(self.cover):
            raise ValueError(f"there are {len(self.forget)} forget prompts and {len(self.cover)} covers")
        for forget, cover in zip(self.forget, self.cover, strict=True):
            if _plain(forget) == _plain(cover):
                raise ValueError(f"the forget prompt {forget!r} is its own cover")

    def __len__(self) -> int:
        return len(self.forget)


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompts to evaluate on.

    Parameters
    ----------
    prompts : tuple of str
        Prompts of the concept.
    near : tuple of str
        Prompts of near concepts, which should be preserved.
    near_concepts : tuple of str
        The concept of each prompt of ``near``; empty if near concepts have no names.
    seeds, guidance_scales : tuple
        Seed and guidance scale of each of ``prompts`` if the list has them, as I2P's does; otherwise empty.
    source : str
        Where ``prompts`` come from.
    table : bool
        Whether they are a table of an attack or a benchmark.
    """

    prompts: tuple[str, ...]
    near: tuple[str, ...]
    near_concepts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    guidance_scales: tuple[float, ...] = ()
    source: str = ""
    table: bool = False


def shipped_prompts() -> list[str]:
    """List the names of the package's lists."""
    folder = Path(str(resources.files("pecker_fast").joinpath("assets", "prompts")))
    return sorted(path.stem for path in folder.glob("*.txt"))


def load_prompts(name_or_path: str | os.PathLike) -> tuple[str, ...]:
    """Load prompts, one per line, from a list of the package by name or from a UTF-8 file.

    Empty lines and lines that begin with # are skipped.

    Raises
    ------
    ValueError
        If there is no such list or file, it is not UTF-8 text, or it has no prompt.
    """
    if str(name_or_path) in shipped_prompts():
        text = resources.files("pecker_fast").joinpath("assets", "prompts", f"{name_or_path}.txt").read_text("utf-8")
    else:
        text = _read(name_or_path)
    prompts = tuple(line.strip() for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise ValueError(f"the prompt file {name_or_path} has no prompt")
    return prompts


def _read(path: str | os.PathLike, what: str = "prompt") -> str:
    if what != "prompt" and not Path(path).is_file():
        raise ValueError(f"{what} is {str(path)!r}, and there is no such file")
    if not Path(path).is_file():
        raise ValueError(
            f"there is no prompt file {str(path)!r}, and no list of that name ({', '.join(shipped_prompts())})"
        )
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the {what} file {path} is not UTF-8 text: {error}") from error


def load_concepts(path: str | os.PathLike) -> tuple[tuple[str, str], ...]:
    """Load concepts to forget at once, each with its cover: a UTF-8 file with "concept, cover" in each line.

    The cover of a name in the package's lists may be left out. A text that contains a comma is put in quotes. Empty
    lines and lines that begin with # are skipped.

    Raises
    ------
    ValueError
        If the file cannot be read or has no concept; or, with the number of the line, if a line has another form, a
        concept is there twice or has no cover, or a cover names a concept of the file.
    """
    lines: dict[int, tuple[str, str]] = {}
    for number, line in enumerate(_read(path, "concepts").split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue

        def refuse(what: str, number: int = number) -> ValueError:
            return ValueError(f"concepts {path}, line {number}: {what}")

        try:
            (fields,) = csv.reader([line.strip()], skipinitialspace=True, strict=True)
        except csv.Error as error:
            raise refuse(f"{line.strip()!r} cannot be read ({error}), expected concept, cover") from error
        fields = [field.strip() for field in fields]
        if len(fields) > 2 or not all(fields):
            what = "an empty text" if len(fields) <= 2 else f"{len(fields)} texts"
            raise refuse(f"{line.strip()!r} has {what}, expected concept, cover (in quotes if with a comma)")
        cover = fields[1] if len(fields) == 2 else default_cover(fields[0])
        if cover is None:
            raise refuse(f"{fields[0]!r} has no cover, and is in none of the lists {' and '.join(COVERS)}")
        earlier = next((n for n, (name, _) in lines.items() if _plain(name) == _plain(fields[0])), None)
        if earlier is not None:
            raise refuse(f"{fields[0]!r} is in line {earlier} already")
        lines[number] = (fields[0], cover)
    if not lines:
        raise ValueError(f"the file of concepts {path} has no concept")
    for number, (_, cover) in lines.items():
        for name, _ in lines.values():
            if names_concept(cover, name):
                raise ValueError(
                    f"concepts {path}, line {number}: the cover {cover!r} names {name!r}, which is to be forgotten"
                )
    return tuple(lines.values())


def load_prompt_table(
    path: str | os.PathLike, near: Sequence[str] = (), concept: str | None = None, column: str | None = None
) -> EvaluationPrompts:
    """Load a table of prompts, with the seeds and guidance scales that it has. ValueError as by ``read_table``."""
    table = read_table(path, concept, column)
    seeds = {"seeds": table.seeds, "guidance_scales": table.guidance_scales}
    return EvaluationPrompts(table.prompts, tuple(near), source=str(path), table=True, **seeds)


def fill(templates: Iterable[str], concept: str) -> tuple[str, ...]:
    """Insert ``concept`` for {concept} in ``templates``. ValueError for a template without {concept}."""
    concept = _stripped("concept", concept)
    templates = tuple(templates)
    for template in templates:
        if CONCEPT not in template:
            raise ValueError(f"the template {template!r} has no {CONCEPT}")
    return tuple(template.replace(CONCEPT, concept) for template in templates)


def override(prompts: Iterable[str], concept: str, cover: str) -> tuple[str, ...]:
    """Replace ``concept`` by ``cover`` in ``prompts``: whole words, ignoring case and white space.

    Raises
    ------
    ValueError
        If a prompt does not contain the concept: it would be its own cover.
    """
    pattern, cover = _pattern(concept), _stripped("cover", cover)
    replaced = []
    for prompt in prompts:
        # A function, so that backslashes in the cover are literal.
        text, count = pattern.subn(lambda _: cover, prompt)
        if count == 0:
            raise ValueError(f"the prompt {prompt!r} does not name the concept {concept!r}")
        replaced.append(text)
    return tuple(replaced)


def _pattern(concept: str) -> re.Pattern[str]:
    words = map(re.escape, _stripped("concept", concept).split())
    # Not \b, because a concept may begin or end with a character that is not a letter.
    return re.compile(r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)", re.IGNORECASE)


def names_concept(prompt: str, concept: str) -> bool:
    """Whether a prompt names a concept: whole words, ignoring case and white space."""
    return _pattern(concept).search(prompt) is not None


def concept_pairs(concept: str, cover: str, templates: str | os.PathLike = "celebrity-train") -> PromptPairs:
    """Pair prompts that name a concept with their covers.

    Parameters
    ----------
    concept, cover : str
        Name of the concept and its replacement.
    templates : str or os.PathLike
        A list or file of templates with {concept}, or of prompts that name the concept.

    Raises
    ------
    ValueError, TypeError
        If the list cannot be read, or a prompt does not name the concept.
    """
    lines = load_prompts(templates)
    forget = fill(lines, concept) if any(CONCEPT in line for line in lines) else lines
    return PromptPairs(forget, override(forget, concept, cover))


def keyword_pairs(
    subjects: str | os.PathLike = "nudity-subjects", keywords: str | os.PathLike = "nudity-keywords"
) -> PromptPairs:
    """Combine each subject with each keyword, as "keyword subject" and as "subject, keyword"; the subject is the cover.

    Drawing uniformly from these pairs is SFD's procedure: a subject, a keyword, and each order with probability 1/2.
    """
    forget, cover = [], []
    for subject in load_prompts(subjects):
        for keyword in load_prompts(keywords):
            forget += [f"{keyword} {subject}", f"{subject}, {keyword}"]
            cover += [subject, subject]
    return PromptPairs(tuple(forget), tuple(cover))


def negative_text(keywords: str | os.PathLike = "nudity-keywords") -> str:
    """Join the keywords, which replace the empty prompt as unconditional input."""
    return ", ".join(load_prompts(keywords))


def default_cover(concept: str) -> str | None:
    """Return the published cover of a celebrity, from the list that has the name; None if no list has it."""
    return next((cover for name, cover in COVERS.items() if _plain(concept) in load_prompts(name)), None)


def near_celebrities(concept: str, forgotten: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the other names of the list that has ``concept``, or of all lists if none has it.

    Names in ``forgotten`` are left out: they are to be forgotten as well.
    """
    lists = [name for name in COVERS if _plain(concept) in load_prompts(name)] or list(COVERS)
    gone = {_plain(concept), *map(_plain, forgotten)}
    return tuple(other for name in lists for other in load_prompts(name) if other not in gone)


def training_prompts(task: str, concept: str | None = None) -> tuple[str, ...]:
    """Return the default forget prompts of a task for training."""
    _check_task(task, concept)
    if task == "nudity":
        return keyword_pairs().forget
    return fill(load_prompts("celebrity-train"), concept)


def evaluation_prompts(
    task: str,
    concept: str | None = None,
    *,
    protocol: Protocol = "disjoint",
    prompts: str | os.PathLike | None = None,
    column: str | None = None,
    near: str | os.PathLike | None = None,
    trained_on: Sequence[str] | None = None,
    forgotten: Sequence[str] = (),
) -> EvaluationPrompts:
    """Return the prompts that a task is evaluated on.

    Parameters
    ----------
    task : {"celebrity", "nudity"}
        The task.
    concept : str, optional
        Name of the celebrity; required for "celebrity".
    protocol : {"disjoint", "paper"}
        "disjoint": no evaluation prompt was trained on. "paper": the training prompts for "celebrity", and for "nudity"
        I2P's table, which ``prompts`` must be.
    prompts : str or os.PathLike, optional
        A list or file instead of the package's list; {concept} in templates is replaced. A .csv, .tsv, .json or .jsonl
        file is a table (``read_table``).
    column : str, optional
        Column of a table that has the prompts.
    near : str or os.PathLike, optional
        A list or file for near concepts: names for "celebrity", prompts for "nudity"; a table has prompts.
    trained_on : sequence of str, optional
        Forget prompts of the training; those of ``training_prompts`` by default.
    forgotten : sequence of str
        Other concepts that are to be forgotten, which are no near concepts.

    Raises
    ------
    ValueError, TypeError
        If the protocol is "disjoint" and a prompt was trained on, a list cannot be read, or an argument is invalid.
    """
    _check_task(task, concept)
    check_choice("protocol", protocol, PROTOCOLS)
    trained_on = training_prompts(task, concept) if trained_on is None else tuple(trained_on)
    paper = protocol == "paper"
    if column is not None and (prompts is None or not is_table(prompts)):
        raise ValueError(f"prompt_column is {column!r}, but prompts is no table (.csv, .tsv, .json or .jsonl)")
    tabled = read_table(near, concept, name="near").prompts if near is not None and is_table(near) else ()
    if task == "nudity":
        if prompts is None and paper:
            raise ValueError("prompts is not given: the paper's protocol evaluates nudity on I2P's table (CSV)")
        near_prompts = tabled or load_prompts("clothed-people" if near is None else near)
        result = _load(prompts or "nudity-eval", concept, near_prompts, column)
        for name, values in (("sd_seed", result.seeds), ("sd_guidance_scale", result.guidance_scales)):
            if paper and not values:
                raise ValueError(
                    f"prompts {prompts} has no column {name}: the paper's protocol evaluates on I2P's table"
                )
    else:
        names = near_celebrities(concept, forgotten) if near is None or tabled else load_prompts(near)
        for other in (concept, *forgotten):
            if _plain(other) in map(_plain, names):
                raise ValueError(f"near names {other!r}, a concept to forget: expected other names")
        if not names:
            raise ValueError(f"near is not given, and all names of the list with {concept!r} are to be forgotten")
        templates = load_prompts("celebrity-eval")
        # One name per template in turn, so that there are as many near prompts as prompts of the concept.
        pairs = [(names[i % len(names)], template) for i, template in enumerate(templates)]
        near_prompts = tabled or tuple(fill([template], name)[0] for name, template in pairs)
        if prompts is None and paper:
            result = EvaluationPrompts(trained_on, near_prompts, source="the prompts trained on")
        else:
            result = _load(prompts or "celebrity-eval", concept, near_prompts, column)
        if not tabled:
            result = replace(result, near_concepts=tuple(name for name, _ in pairs))
    if not paper:
        check_disjoint(trained_on, result.prompts)
    return result


def _load(
    source: str | os.PathLike, concept: str | None, near: tuple[str, ...], column: str | None = None
) -> EvaluationPrompts:
    if is_table(source):
        return load_prompt_table(source, near, concept, column)
    lines = load_prompts(source)
    if concept is not None and any(CONCEPT in line for line in lines):
        lines = fill(lines, concept)
    return EvaluationPrompts(lines, near, source=str(source))


def check_disjoint(training: Iterable[str], evaluation: Iterable[str]) -> None:
    """Raise ValueError if a prompt is in both, ignoring case and white space."""
    training = {_plain(prompt) for prompt in training}
    shared = [prompt for prompt in evaluation if _plain(prompt) in training]
    if shared:
        raise ValueError(
            f"{len(shared)} evaluation prompts were trained on, such as {shared[0]!r}: "
            'use others, or protocol "paper" as in the public code'
        )


def _check_task(task: str, concept: str | None) -> None:
    check_choice("task", task, TASKS)
    if task == "celebrity":
        _stripped("concept", concept)


def _stripped(name: str, value: str | None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, expected a text")
    if not value.strip():
        raise ValueError(f"{name} is empty, expected a text")
    return value.strip()


def _plain(text: str) -> str:
    """``text`` in lower case with single spaces, for comparisons."""
    return " ".join(text.lower().split())
