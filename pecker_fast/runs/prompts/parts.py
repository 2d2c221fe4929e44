"""The prompts of an evaluation, concept by concept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...data import EvaluationPrompts
from ...data.prompts import names_concept, override
from .measure import Captions, MeasureArguments


@dataclass(frozen=True)
class Concept:
    """What was to be forgotten.

    Parameters
    ----------
    name, cover : str or None
        Its name and its cover, if it has them.
    """

    name: str | None
    cover: str | None = None


@dataclass(frozen=True)
class Part:
    """The prompts of one concept among those of all.

    Parameters
    ----------
    concept : Concept
        The concept.
    rows, near_rows : range
        Numbers of its prompts, and of those of its near concepts.
    alternatives, near_alternatives : tuple of str
        For each of them the same prompt with the cover in place of the name; empty without a cover.
    """

    concept: Concept
    rows: range
    near_rows: range
    alternatives: tuple[str, ...]
    near_alternatives: tuple[str, ...]


def prompts_of(
    images: MeasureArguments, task: str, concepts: Sequence[Concept], trained_on: Sequence[str] | None
) -> tuple[EvaluationPrompts, list[Part], int, Captions | None]:
    """The prompts of all concepts, which of them are whose, the number of images of each, and the captions.

    ValueError or TypeError for a wrong option. Concepts with the same near concepts and the same cover share these.
    """
    prompts, near, near_concepts, parts = [], [], [], []
    shared: dict[tuple[tuple[str, ...], str | None], range] = {}
    names = [concept.name for concept in concepts if concept.name is not None]
    for concept in concepts:
        others = [name for name in names if name != concept.name]
        one, count, captions = images.resolved(task, concept.name, trained_on, others)
        rows = range(len(prompts), len(prompts) + len(one.prompts))
        key = one.near, concept.cover
        if key not in shared:
            shared[key] = range(len(near), len(near) + len(one.near))
            near += one.near
            near_concepts += one.near_concepts
        prompts += one.prompts
        own = covered(one.prompts, [concept.name] * len(one.prompts), concept.cover)
        parts.append(Part(concept, rows, shared[key], own, covered(one.near, one.near_concepts, concept.cover)))
    if len(concepts) == 1:
        return one, parts, count, captions
    if one.table:
        raise ValueError(f"prompts is {images.prompts!r}, a table: expected templates, as there are several concepts")
    every = replace(one, prompts=tuple(prompts), near=tuple(near), near_concepts=tuple(near_concepts))
    return every, parts, count, captions


def near_alternatives(parts: Sequence[Part]) -> list[str]:
    """The alternatives of all prompts of near concepts; empty if one has none."""
    every = {row: text for part in parts for row, text in zip(part.near_rows, part.near_alternatives, strict=False)}
    rows = {row for part in parts for row in part.near_rows}
    return [every[row] for row in sorted(rows)] if rows == every.keys() else []


def shown_first(prompts: EvaluationPrompts, parts: Sequence[Part]) -> EvaluationPrompts:
    """The prompts with one of each concept after the other, so that pictures of the first show all concepts."""
    if len(parts) == 1:
        return prompts
    longest = max(len(part.rows) for part in parts)
    rows = [part.rows[i] for i in range(longest) for part in parts if i < len(part.rows)]
    return replace(prompts, prompts=tuple(prompts.prompts[row] for row in rows))


def covered(prompts: Sequence[str], names: Sequence[str | None], cover: str | None) -> tuple[str, ...]:
    """The prompts with the cover in place of the names, or the cover alone if a prompt does not name its concept."""
    if cover is None or len(names) != len(prompts):
        return ()
    return tuple(
        override([text], name, cover)[0] if name is not None and names_concept(text, name) else cover
        for text, name in zip(prompts, names, strict=True)
    )
