"""Pictures of samples, a row a class, with one fixed mapping of [-1, 1] to grey or colour."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import replacing
from . import fonts
from .panels import KEY, Panel, described

# Images are magnified by an integer factor, up to about this height in pixels.
SHOWN_HEIGHT = 32
GAP = 2
# Space for the names of classes: at least, and at most.
LABEL_WIDTH, LABEL_LIMIT = 44, 130
# Space for prompts.
PROMPT_WIDTH = 190
TITLE_HEIGHT = 18
LETTER_SIZE, LINE_HEIGHT = 10, 12
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


def _wrapped(text: str, label_width: int, height: int):
    """``text`` in lines that fit in ``label_width`` and ``height`` pixels, shortened if need be; and its font."""
    font, text = fonts.picture_font(text, LETTER_SIZE)
    words = " ".join(text.split())
    most = max(1, height // LINE_HEIGHT)
    # The most letters in a line that leave none of the lines too long.
    for letters in range(len(words), 0, -1):
        lines = textwrap.wrap(words, letters, max_lines=most, placeholder="..."[:letters])
        if all(font.getlength(line) <= label_width - 8 for line in lines):
            return "\n".join(lines), font
    return words[:1], font


def label_width(names: Sequence[str]) -> int:
    """Space for the longest of the names of classes, in pixels."""
    widths = [font.getlength(text) for font, text in (fonts.picture_font(name, LETTER_SIZE) for name in names)]
    return int(min(max(LABEL_WIDTH, *(width + 10 for width in widths)), LABEL_LIMIT))


def _grid(
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    highlight: Collection[int],
    title: str,
    label_width: int,
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
        font, text = fonts.picture_font(title, LETTER_SIZE)
        draw.text((label_width, 3), text, fill=INK, font=font)
    for row, label in enumerate(classes):
        y = top + GAP + row * cell_height
        colour = MARKED if label in highlight else INK
        name, font = _wrapped(class_names[label], label_width, cell_height)
        top_line = y + (cell_height - GAP - LINE_HEIGHT * (name.count("\n") + 1)) // 2
        for i, line in enumerate(name.split("\n")):
            draw.text((4, top_line + i * LINE_HEIGHT), line, fill=colour, font=font)
        for column, image in enumerate(pixels[labels == label]):
            x = label_width + GAP + column * cell_width
            tile = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            sheet.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
        if label in highlight:
            box = (label_width, y - GAP, size[0] - 1, y + cell_height - GAP + 1)
            draw.rectangle(box, outline=MARKED, width=GAP)
    return sheet


def save_grid(
    path: Path,
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    highlight: Collection[int] = (),
    names_width: int | None = None,
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
    names_width : int, optional
        Space for the names in pixels. Default: as the longest needs, up to a limit.

    Raises
    ------
    ValueError
        If shapes or labels do not fit.
    """
    width = label_width(class_names) if names_width is None else names_width
    sheet = _grid(images, labels.cpu(), class_names, highlight, "", width)
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
    names_width: int | None = None,
) -> None:
    """Writes a PNG with several grids of the same labels side by side.

    Parameters
    ----------
    sheets : mapping of str to Tensor
        The title of each grid and its images.
    names_width : int, optional
        Space in pixels for long names such as prompts, which are wrapped and written once, on the left. By default
        names of classes are written beside each grid, and the PNG records the grids as its panels.
    path, labels, class_names, highlight
        As for ``save_grid``.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    width = label_width(class_names) if names_width is None else names_width
    grids = [_grid(images, labels.cpu(), class_names, highlight, title, width) for title, images in sheets.items()]
    cut = 0 if names_width is None else width
    grids = [grid if i == 0 else grid.crop((cut, 0, *grid.size)) for i, grid in enumerate(grids)]
    both = Image.new("RGB", (sum(grid.width for grid in grids) + 12 * (len(grids) - 1), grids[0].height), BACKGROUND)
    x, panels = 0, []
    for title, grid in zip(sheets, grids, strict=True):
        both.paste(grid, (x, 0))
        panels.append(Panel(f"{title}, a row a class", (x, 0, x + grid.width, grid.height)))
        x += grid.width + 12
    recorded = PngInfo()
    if names_width is None:
        recorded.add_text(KEY, described(panels))
    with replacing(path) as temporary:
        both.save(temporary, format="PNG", pnginfo=recorded)
