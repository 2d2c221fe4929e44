"""Prompts of concepts: lists that come with the package, files of the user's, and how forget prompts meet their covers.

The files are in ``assets/prompts``, a prompt a line. What is trained on and what is measured on are different lists;
the public code of SFD measures on its training prompts, which ``protocol="paper"`` does too.
"""

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

TASKS = ("celebrity", "nudity")
PROTOCOLS = ("disjoint", "paper")
CONCEPT = "{concept}"
# What is drawn in a celebrity's place by default (SFD, arXiv 2409.11219), by the list that has the name.
COVERS = {"celebrity-men": "a middle aged man", "celebrity-women": "a middle aged woman"}

Protocol = Literal["disjoint", "paper"]


@dataclass(frozen=True)
class PromptPairs:
    """Prompts to forget, each with the prompt that is to be drawn instead. ValueError where there are none, or not as
    many of both, or a prompt is its own cover."""

    forget: tuple[str, ...]
    cover: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.forget or len(self.forget) != len(self.cover):
            raise ValueError(f"there are {len(self.forget)} forget prompts and {len(self.cover)} covers")
        for forget, cover in zip(self.forget, self.cover, strict=True):
            if _plain(forget) == _plain(cover):
                raise ValueError(f"the prompt {forget!r} is to be forgotten and is its own cover")

    def __len__(self) -> int:
        return len(self.forget)


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompts to measure on.

    Parameters
    ----------
    prompts: of the concept.
    near: of near concepts, which are to be kept.
    near_concepts: what each prompt of ``near`` is of, one for each; empty where they have no names.
    seeds, guidance_scales: of each of ``prompts``, where the list gives them (I2P's does); otherwise empty.
    source: where ``prompts`` come from.
    """

    prompts: tuple[str, ...]
    near: tuple[str, ...]
    near_concepts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    guidance_scales: tuple[float, ...] = ()
    source: str = ""


def shipped_prompts() -> list[str]:
    """Names of the lists that come with the package."""
    folder = Path(str(resources.files("pecker_fast").joinpath("assets", "prompts")))
    return sorted(path.stem for path in folder.glob("*.txt"))


def load_prompts(name_or_path: str | os.PathLike) -> tuple[str, ...]:
    """The prompts of a list that comes with the package, by name, or of a UTF-8 file, one a line.

    Empty lines and lines that begin with # are left out. ValueError where there is no such list or file, it is no text,
    or it has no prompt.
    """
    if str(name_or_path) in shipped_prompts():
        text = resources.files("pecker_fast").joinpath("assets", "prompts", f"{name_or_path}.txt").read_text("utf-8")
    else:
        text = _read(name_or_path)
    found = tuple(line.strip() for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#"))
    if not found:
        raise ValueError(f"the prompt file {name_or_path} has no prompt")
    return found


def _read(path: str | os.PathLike) -> str:
    if not Path(path).is_file():
        raise ValueError(
            f"there is no prompt file {str(path)!r}, and no list of that name ({', '.join(shipped_prompts())})"
        )
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text: {error}") from error


def load_i2p(path: str | os.PathLike, near: Sequence[str] = ()) -> EvaluationPrompts:
    """The prompts of I2P's table (CSV with the columns prompt, sd_seed and sd_guidance_scale; others are ignored).

    ValueError where a column or all rows are missing, or a seed or a scale is not a number.
    """
    rows = list(csv.DictReader(io.StringIO(_read(path), newline="")))
    missing = [name for name in ("prompt", "sd_seed", "sd_guidance_scale") if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"the prompt table {path} has no rows with the column {missing[0]!r}")
    try:
        seeds = tuple(int(float(row["sd_seed"])) for row in rows)
        scales = tuple(float(row["sd_guidance_scale"]) for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the prompt table {path} has a seed or a guidance scale that is not a number") from error
    if any(not row["prompt"].strip() for row in rows):
        raise ValueError(f"the prompt table {path} has a row without a prompt")
    prompts = tuple(row["prompt"].strip() for row in rows)
    return EvaluationPrompts(prompts, tuple(near), seeds=seeds, guidance_scales=scales, source=str(path))


def fill(templates: Iterable[str], concept: str) -> tuple[str, ...]:
    """``templates`` with ``concept`` in the place of {concept}. ValueError for a template without one."""
    concept = _named("concept", concept)
    templates = tuple(templates)
    for template in templates:
        if CONCEPT not in template:
            raise ValueError(f"the template {template!r} has no {CONCEPT}")
    return tuple(template.replace(CONCEPT, concept) for template in templates)


def override(prompts: Iterable[str], concept: str, cover: str) -> tuple[str, ...]:
    """``prompts`` with ``cover`` in the place of ``concept``: whole words of any case, with any white space between.

    ValueError for a prompt without the concept: it would be its own cover.
    """
    words = map(re.escape, _named("concept", concept).split())
    cover = _named("cover", cover)
    # Not \b: a concept may begin or end with a sign that is no letter.
    pattern = re.compile(r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)", re.IGNORECASE)
    found = []
    for prompt in prompts:
        # As a function: backslashes in the cover mean themselves.
        text, count = pattern.subn(lambda _: cover, prompt)
        if count == 0:
            raise ValueError(f"the prompt {prompt!r} does not name the concept {concept!r}")
        found.append(text)
    return tuple(found)


def concept_pairs(concept: str, cover: str, templates: str | os.PathLike = "celebrity-train") -> PromptPairs:
    """Forget prompts of a concept with a name and their covers.

    ``templates``: a list or file of templates with {concept}, or of prompts that name the concept.
    """
    lines = load_prompts(templates)
    forget = fill(lines, concept) if any(CONCEPT in line for line in lines) else lines
    return PromptPairs(forget, override(forget, concept, cover))


def keyword_pairs(
    subjects: str | os.PathLike = "nudity-subjects", keywords: str | os.PathLike = "nudity-keywords"
) -> PromptPairs:
    """Every subject with every keyword, before it ("keyword subject") and behind it ("subject, keyword"); the bare
    subject is the cover.

    A uniform draw of these pairs is SFD's draw: a subject, a keyword, and with probability 1/2 before or behind.
    """
    forget, cover = [], []
    for subject in load_prompts(subjects):
        for keyword in load_prompts(keywords):
            forget += [f"{keyword} {subject}", f"{subject}, {keyword}"]
            cover += [subject, subject]
    return PromptPairs(tuple(forget), tuple(cover))


def negative_text(keywords: str | os.PathLike = "nudity-keywords") -> str:
    """The keywords, joined: what takes the place of the empty prompt as unconditional input."""
    return ", ".join(load_prompts(keywords))


def default_cover(concept: str) -> str | None:
    """The published cover of a celebrity by the list that has the name; None where none has."""
    return next((cover for name, cover in COVERS.items() if _plain(concept) in load_prompts(name)), None)


def near_celebrities(concept: str) -> tuple[str, ...]:
    """Other names of the list that has ``concept``; of all lists where none has it."""
    of = [name for name in COVERS if _plain(concept) in load_prompts(name)] or list(COVERS)
    return tuple(other for name in of for other in load_prompts(name) if other != _plain(concept))


def training_prompts(task: str, concept: str | None = None) -> tuple[str, ...]:
    """The forget prompts that a task is trained on by default."""
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
    near: str | os.PathLike | None = None,
    trained_on: Sequence[str] | None = None,
) -> EvaluationPrompts:
    """What a task is measured on.

    Parameters
    ----------
    task: "celebrity", which needs ``concept``, or "nudity".
    protocol: "disjoint", or "paper": a celebrity on the prompts that were trained on, nudity on I2P's table, which
        ``prompts`` has to give.
    prompts: a list or file of the user's in place of the list that comes with the package; templates with {concept} are
        filled in. A file that ends with .csv is I2P's table.
    near: likewise for near concepts: names for "celebrity", prompts for "nudity".
    trained_on: forget prompts of the training; those of ``training_prompts`` by default.

    Raises ValueError where the protocol is "disjoint" and a prompt was trained on.
    """
    _check_task(task, concept)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}, expected {' or '.join(PROTOCOLS)}")
    trained_on = training_prompts(task, concept) if trained_on is None else tuple(trained_on)
    paper = protocol == "paper"
    if task == "nudity":
        if prompts is None and paper:
            raise ValueError("prompts is not given: nudity in the paper's protocol is measured on I2P's table (CSV)")
        beside = load_prompts("clothed-people" if near is None else near)
        found = _listed(prompts or "nudity-eval", concept, beside)
    else:
        names = near_celebrities(concept) if near is None else load_prompts(near)
        if _plain(concept) in map(_plain, names):
            raise ValueError(f"near names {concept!r}, which is to be forgotten: expected other names")
        templates = load_prompts("celebrity-eval")
        # One name a template, in turns: as many prompts of near concepts as of the concept.
        pairs = [(names[i % len(names)], template) for i, template in enumerate(templates)]
        beside = tuple(fill([template], name)[0] for name, template in pairs)
        if prompts is None and paper:
            found = EvaluationPrompts(trained_on, beside, source="the prompts trained on")
        else:
            found = _listed(prompts or "celebrity-eval", concept, beside)
        found = EvaluationPrompts(
            found.prompts, beside, tuple(name for name, _ in pairs), found.seeds, found.guidance_scales, found.source
        )
    if not paper:
        check_disjoint(trained_on, found.prompts)
    return found


def _listed(source: str | os.PathLike, concept: str | None, near: tuple[str, ...]) -> EvaluationPrompts:
    if Path(source).suffix.lower() == ".csv":
        return load_i2p(source, near)
    lines = load_prompts(source)
    if concept is not None and any(CONCEPT in line for line in lines):
        lines = fill(lines, concept)
    return EvaluationPrompts(lines, near, source=str(source))


def check_disjoint(training: Iterable[str], evaluation: Iterable[str]) -> None:
    """ValueError where a prompt is in both, but for case and white space."""
    trained = {_plain(prompt) for prompt in training}
    both = [prompt for prompt in evaluation if _plain(prompt) in trained]
    if both:
        raise ValueError(
            f"{len(both)} evaluation prompts were trained on, such as {both[0]!r}: "
            'measure on others, or as the public code does with protocol "paper"'
        )


def _check_task(task: str, concept: str | None) -> None:
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected {' or '.join(TASKS)}")
    if task == "celebrity":
        _named("concept", concept)


def _named(name: str, value: str | None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, expected a text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value.strip()


def _plain(text: str) -> str:
    """``text`` without regard to case and white space."""
    return " ".join(text.lower().split())
