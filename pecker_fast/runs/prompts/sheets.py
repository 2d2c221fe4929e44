"""Pictures of an evaluation: a few images of a few prompts, for one model or for several side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ...data import EvaluationPrompts
from ...files import save_tensors
from ...report import PROMPT_WIDTH, save_side_by_side
from ...unlearning.streams import derived_seed
from .sampling import PromptSampler

# Prompts, and images of each, in a picture; the height that an image is shown at.
PICTURED_PROMPTS, PICTURED_IMAGES, PICTURED_HEIGHT = 8, 3, 128
# The images of the pictures, for pictures of several models.
PICTURED = "pictured.safetensors"


def prompt_items(prompts: Sequence[str], images: int, seed: int, own: Sequence[int] = ()) -> Tensor:
    """The images to draw: int64 (prompts x images, 2), the number of a prompt and a seed, prompt by prompt.

    As published, image j of every prompt has the seed ``seed`` + j: the same noise for all prompts. If prompts have
    seeds of their ``own``, it is derived from these.
    """
    rows = [
        (i, derived_seed(own[i], seed + j) if own else seed + j) for i in range(len(prompts)) for j in range(images)
    ]
    return torch.tensor(rows)


def pictured(prompts: EvaluationPrompts) -> dict[str, Sequence[str]]:
    """Name of each picture to its prompts."""
    return {"concept": prompts.prompts[:PICTURED_PROMPTS], "near": prompts.near[:PICTURED_PROMPTS]}


def save_sheets(
    folder: Path, sampler: PromptSampler, before: PromptSampler | None, prompts: EvaluationPrompts, seed: int
) -> None:
    """Draw samples/concept.png and samples/near.png, beside images of ``before`` if given; and save the images."""
    (folder / "samples").mkdir(exist_ok=True)
    drawn = {}
    for name, texts in pictured(prompts).items():
        items = prompt_items(texts, PICTURED_IMAGES, seed)
        drawn[name] = small(sampler.drawing(texts)(items))
        sheets = {"drawn": drawn[name]}
        if before is not None:
            sheets = {"before": small(before.drawing(texts)(items)), "after": drawn[name]}
        path = folder / "samples" / f"{name}.png"
        save_side_by_side(path, sheets, items[:, 0], texts, names_width=PROMPT_WIDTH)
    save_tensors(folder / "samples" / PICTURED, drawn)


def save_sheets_of_all(folder: Path, runs: Mapping[str, Path], prompts: EvaluationPrompts) -> None:
    """Draw concept.png and near.png in ``folder`` from the saved images of several runs, title to folder."""
    images = {title: safetensors.torch.load_file(run / "samples" / PICTURED) for title, run in runs.items()}
    for name, texts in pictured(prompts).items():
        sheets = {title: part[name] for title, part in images.items()}
        rows = torch.arange(len(texts)).repeat_interleave(PICTURED_IMAGES)
        save_side_by_side(folder / f"{name}.png", sheets, rows, texts, names_width=PROMPT_WIDTH)


def small(images: Tensor) -> Tensor:
    """uint8 images as images in [-1, 1], at most as high as they are shown."""
    images = images.float() / 127.5 - 1
    if images.shape[2] <= PICTURED_HEIGHT:
        return images
    scale = PICTURED_HEIGHT / images.shape[2]
    return torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
