"""Tables of prompts as attacks and benchmarks publish them: CSV, TSV, JSON and JSON lines, by the names of columns.

| published by | format | columns that are read |
| --- | --- | --- |
| I2P | CSV | prompt, sd_seed, sd_guidance_scale |
| UnlearnDiffAtk, P4D | CSV | prompt, evaluation_seed, evaluation_guidance |
| Ring-A-Bell | CSV | prompt, evaluation_seed |
| MMA-Diffusion | CSV, JSON lines | adv_prompt |
| EMMA | JSON | concept to prompts, in an object or in a list of objects |
| COCO | JSON | annotations (caption, image_id) and images (id, file_name) |
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
# What a column may be called, the first that there is.
PROMPTS = ("prompt", "adv_prompt", "caption", "text")
SEEDS = ("evaluation_seed", "sd_seed", "seed")
SCALES = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale")
# Names of columns or concepts in a message.
SHOWN = 8
# Characters of a field: prompts can be longer than the csv module's usual limit.
LONGEST = 1 << 24


@dataclass(frozen=True)
class PublishedPrompts:
    """The rows of a table.

    Parameters
    ----------
    prompts : tuple of str
        A prompt for each row.
    seeds, guidance_scales : tuple
        Of each row; empty if the table has no such column.
    images : tuple of str
        File name of the image that each caption is of; empty if the table does not say.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    guidance_scales: tuple[float, ...] = ()
    images: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, numbers: Sequence[int]) -> "PublishedPrompts":
        """The rows of these numbers, in their order."""
        columns = (self.prompts, self.seeds, self.guidance_scales, self.images)
        return PublishedPrompts(*(tuple(column[i] for i in numbers) if column else () for column in columns))


def is_table(path: str | os.PathLike) -> bool:
    """Whether a file is a table, by its name; others have a prompt in each line."""
    return Path(path).suffix.lower() in SUFFIXES


def read_table(
    path: str | os.PathLike, concept: str | None = None, column: str | None = None, name: str = "prompts"
) -> PublishedPrompts:
    """Read a table.

    Parameters
    ----------
    path : str or os.PathLike
        A UTF-8 file whose name ends with .csv, .tsv, .json or .jsonl.
    concept : str, optional
        Of a file with the prompts of several concepts (EMMA's), the one to take.
    column : str, optional
        The column with the prompts; by default the first of prompt, adv_prompt, caption and text.
    name : str
        Name of the argument in error messages.

    Returns
    -------
    PublishedPrompts

    Raises
    ------
    ValueError
        If the file cannot be read, has no rows or no column of prompts, or, with the row and the column, if a prompt is
        empty, a seed is not an integer from 0 or a guidance scale is not a number.
    """
    path = Path(path)
    where = f"{name} {path}"
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{name} is {str(path)!r}, and there is no such file") from error
    suffix = path.suffix.lower()
    if suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
        if isinstance(value, Mapping) and "annotations" in value:
            return _coco(value, where)
        by_concept = _by_concept(value)
        if by_concept is not None:
            return PublishedPrompts(_of_concept(by_concept, concept, where))
        rows = value
    elif suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"{where}, line {number}: no JSON: {error}") from error
    else:
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ","))
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{where} has no rows with columns")
    return _columns(rows, column, where)


def _columns(rows: Sequence[Mapping[str, Any]], column: str | None, where: str) -> PublishedPrompts:
    head = [str(key) for key in rows[0] if key is not None]
    wanted = PROMPTS if column is None else (column,)
    prompts = next((key for key in wanted if key in head), None)
    if prompts is None:
        listed = ", ".join(head[:SHOWN]) + (", ..." if len(head) > SHOWN else "")
        raise ValueError(
            f"{where} has the columns {listed[:200]}, expected {' or '.join(wanted)}; a file of lines without columns "
            "has to be named .txt"
        )

    def values(key: str, read: Any, expected: str) -> list[Any]:
        result = []
        for number, row in enumerate(rows, 1):
            try:
                result.append(read(row.get(key)))
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{where}, row {number}: {key} is {row.get(key)!r}, expected {expected}") from error
        return result

    seeds, scales = (next((key for key in names if key in head), None) for names in (SEEDS, SCALES))
    return PublishedPrompts(
        tuple(values(prompts, _text, "a prompt")),
        () if seeds is None else tuple(values(seeds, _seed, "an integer from 0")),
        () if scales is None else tuple(values(scales, _scale, "a number from 0")),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value.strip()


def _seed(value: Any) -> int:
    # pandas writes a column with a gap as 12.0.
    number = float(value)
    if not number.is_integer() or number < 0:
        raise ValueError
    return int(value) if isinstance(value, str) and value.strip().isdigit() else int(number)


def _scale(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError
    return number


def _by_concept(value: Any) -> dict[str, list[str]] | None:
    """Concept to its prompts; None if ``value`` is of another form."""
    objects = [value] if isinstance(value, Mapping) else value
    if not isinstance(objects, list) or not objects or not all(isinstance(item, Mapping) for item in objects):
        return None
    result: dict[str, list[str]] = {}
    for item in objects:
        for key, prompts in item.items():
            if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
                return None
            result.setdefault(str(key), []).extend(prompts)
    return result or None


def _of_concept(by_concept: Mapping[str, list[str]], concept: str | None, where: str) -> tuple[str, ...]:
    key = next((key for key in by_concept if concept is not None and _plain(key) == _plain(concept)), None)
    if key is None and len(by_concept) == 1:
        key = next(iter(by_concept))
    if key is None:
        listed = ", ".join(list(by_concept)[:SHOWN]) + (", ..." if len(by_concept) > SHOWN else "")
        raise ValueError(f"{where} has the prompts of {listed}, and concept is {concept!r}: expected one of them")
    prompts = tuple(text.strip() for text in by_concept[key])
    if not prompts or not all(prompts):
        raise ValueError(f"{where} has an empty prompt, or none, for {key!r}")
    return prompts


def _plain(name: str) -> str:
    """A name in lower case with single spaces, as EMMA's keys with hyphens are written."""
    return " ".join(name.lower().replace("-", " ").replace("_", " ").split())


def _coco(value: Mapping[str, Any], where: str) -> PublishedPrompts:
    """The first caption of each image, in the order of the images' numbers."""
    try:
        files = {int(image["id"]): str(image["file_name"]) for image in value.get("images", [])}
        captions: dict[int, tuple[int, str]] = {}
        for row in value["annotations"]:
            entry = int(row["id"]), _text(row["caption"])
            number = int(row["image_id"])
            captions[number] = min(entry, captions.get(number, entry))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} has an annotation without image_id, id or caption, or an image without id or file_name"
        ) from error
    if not captions:
        raise ValueError(f"{where} has no annotations")
    numbers = sorted(captions)
    missing = next((number for number in numbers if number not in files), None) if files else None
    if missing is not None:
        raise ValueError(f"{where} has a caption of the image {missing}, which its images do not have")
    return PublishedPrompts(
        tuple(captions[number][1] for number in numbers), images=tuple(files[number] for number in numbers if files)
    )


def unsafe_name(images: Iterable[str]) -> str | None:
    """The first file name that leads out of its folder; None if there is none."""
    return next((name for name in images if Path(name).is_absolute() or ".." in Path(name).parts), None)
