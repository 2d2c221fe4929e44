"""Pictures of samples, a row a class, with one fixed mapping of [-1, 1] to grey or colour."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import replacing

# Images are magnified by an integer factor, up to about this height in pixels.
SHOWN_HEIGHT = 32
GAP = 2
LABEL_WIDTH = 44
TITLE_HEIGHT = 18
# Size of a letter of the default font, in pixels.
LETTER_WIDTH, LINE_HEIGHT = 6, 12
BACKGROUND, INK, MARKED = (255, 255, 255), (40, 40, 40), (213, 94, 0)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) from images in [-1, 1], clamped to that range; the same mapping for every image."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _check(images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, 1, H, W) or (N, 3, H, W)")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected ({len(images)},), one for each image")
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(class_names):
        raise ValueError(f"labels has classes outside 0 to {len(class_names) - 1}, or none")


def _name(text: str, label_width: int, height: int) -> str:
    """``text`` wrapped and shortened to fit in ``label_width`` and ``height`` pixels."""
    if label_width == LABEL_WIDTH:
        return text[:6]
    width, lines = (label_width - 8) // LETTER_WIDTH, max(1, height // LINE_HEIGHT)
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="..."))


def _grid(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    highlight: Collection[int],
    title: str = "",
    label_width: int = LABEL_WIDTH,
):
    from PIL import Image, ImageDraw

    _check(images, labels, class_names)
    pixels = to_pixels(images.detach().cpu())
    height, width = pixels.shape[2:]
    scale = max(1, SHOWN_HEIGHT // height)
    classes = sorted(set(labels.tolist()))
    columns = int(labels.bincount().max())
    cell_height, cell_width = height * scale + GAP, width * scale + GAP
    top = TITLE_HEIGHT if title else 0
    size = label_width + columns * cell_width + GAP, top + len(classes) * cell_height + GAP
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((label_width, 3), title, fill=INK)
    for row, label in enumerate(classes):
        y = top + GAP + row * cell_height
        colour = MARKED if label in highlight else INK
        name = _name(class_names[label], label_width, cell_height)
        draw.text((4, y + cell_height // 2 - 6 * len(name.splitlines())), name, fill=colour)
        for column, image in enumerate(pixels[labels == label]):
            x = label_width + GAP + column * cell_width
            tile = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            sheet.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
        if label in highlight:
            box = (label_width, y - GAP, size[0] - 1, y + cell_height - GAP + 1)
            draw.rectangle(box, outline=MARKED, width=GAP)
    return sheet


def save_grid(
    path: Path, images: Tensor, labels: Tensor, class_names: Sequence[str], highlight: Collection[int] = ()
) -> None:
    """Writes a PNG with a row for each class.

    Parameters
    ----------
    path : Path
    images : Tensor
        Shape (N, C, H, W) with C of 1 or 3, in [-1, 1].
    labels : Tensor
        Shape (N,), int64.
    class_names : sequence of str
        By label.
    highlight : collection of int
        Classes whose rows are framed.

    Raises
    ------
    ValueError
        If shapes or labels do not fit.
    """
    sheet = _grid(images, labels.cpu(), class_names, highlight)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def save_before_after(
    path: Path,
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    highlight: Collection[int] = (),
) -> None:
    """Writes a PNG with samples of the same labels before and after, side by side. Arguments as for ``save_grid``."""
    save_side_by_side(path, {"before": before, "after": after}, labels, class_names, highlight)


def save_side_by_side(
    path: Path,
    sheets: Mapping[str, Tensor],
    labels: Tensor,
    class_names: Sequence[str],
    highlight: Collection[int] = (),
    label_width: int = LABEL_WIDTH,
) -> None:
    """Writes a PNG with several grids of the same labels side by side.

    Parameters
    ----------
    sheets : mapping of str to Tensor
        The title of each grid and its images.
    label_width : int
        Space for the names in pixels. If it is not the default, long names such as prompts are wrapped and written
        once, on the left.
    path, labels, class_names, highlight
        As for ``save_grid``.
    """
    from PIL import Image

    grids = [
        _grid(images, labels.cpu(), class_names, highlight, title, label_width) for title, images in sheets.items()
    ]
    # Names of classes are short enough to be repeated beside each grid.
    cut = 0 if label_width == LABEL_WIDTH else label_width
    grids = [grid if i == 0 else grid.crop((cut, 0, *grid.size)) for i, grid in enumerate(grids)]
    both = Image.new("RGB", (sum(grid.width for grid in grids) + 12 * (len(grids) - 1), grids[0].height), BACKGROUND)
    x = 0
    for grid in grids:
        both.paste(grid, (x, 0))
        x += grid.width + 12
    with replacing(path) as temporary:
        both.save(temporary, format="PNG")
