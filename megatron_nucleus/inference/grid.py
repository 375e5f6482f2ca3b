"""Contact sheets: pictures in rows, each with its prompt under it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from megatron_nucleus.utils.errors import ConfigError

CELL_PX = 192  # side that a picture is scaled to: small pictures grow, large ones shrink
GAP_PX = 12
FONT_PX = 13
LINE_PX = 16
MAX_LINES = 4
_INK, _PAPER, _EDGE = (30, 30, 30), (255, 255, 255), (205, 205, 205)


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    cell_px: int = CELL_PX,
) -> Image.Image:
    """Draw pictures in reading order, captions wrapped under them to at most four lines.

    Args:
        images: any sizes; each is scaled so that its longer side is ``cell_px``: without smoothing where it
            grows (every pixel stays visible), with it where it shrinks.
        captions: one per picture, or None for none.
        columns: pictures per row; None = about square, at most 8.

    Raises:
        ConfigError: no pictures, or another number of captions than of pictures.
    """
    if not images:
        raise ConfigError("a contact sheet needs at least one picture")
    if captions is not None and len(captions) != len(images):
        raise ConfigError(f"a contact sheet of {len(images)} pictures was given {len(captions)} captions")
    columns = min(len(images), columns or min(8, math.ceil(math.sqrt(len(images)))))
    cells = [fit(image, cell_px) for image in images]
    texts = [wrap(caption, cell_px) for caption in captions] if captions is not None else [[] for _ in images]
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    heights = [
        max(cells[i].height for i in row) + (4 + LINE_PX * max(len(texts[i]) for i in row) if captions else 0)
        for row in rows
    ]
    size = (GAP_PX + columns * (cell_px + GAP_PX), GAP_PX + sum(h + GAP_PX for h in heights))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP_PX
    for row, height in zip(rows, heights, strict=True):
        picture_px = max(cells[i].height for i in row)
        for column, i in enumerate(row):
            left = GAP_PX + column * (cell_px + GAP_PX)
            _draw_cell(sheet, draw, cells[i], texts[i], left, top, cell_px, picture_px)
        top += height + GAP_PX
    return sheet


def _draw_cell(sheet, draw, picture, lines, left: int, top: int, cell_px: int, picture_px: int) -> None:
    x, y = left + (cell_px - picture.width) // 2, top + (picture_px - picture.height) // 2
    sheet.paste(picture, (x, y))
    draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=_EDGE)
    for n, line in enumerate(lines):
        draw.text((left, top + picture_px + 4 + n * LINE_PX), line, fill=_INK, font=_font())


def fit(image: Image.Image, side_px: int) -> Image.Image:
    """The picture in RGB, scaled so that its longer side is ``side_px``."""
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(
        size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    )


def wrap(text: str, width_px: int, max_lines: int = MAX_LINES) -> list[str]:
    """Lines of ``text`` that fit into ``width_px``; what does not fit into ``max_lines`` ends in an ellipsis.

    A word wider than a line is cut. The empty text is shown as (no prompt).
    """
    words = text.split() or ["(no prompt)"]
    lines = [""]
    for piece in (piece for word in words for piece in _pieces(word, width_px)):
        longer = f"{lines[-1]} {piece}".strip()
        if _fits(longer, width_px):
            lines[-1] = longer
        else:
            lines.append(piece)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and not _fits(last + "…", width_px):
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last + "…"]
    return lines


def _pieces(word: str, width_px: int) -> list[str]:
    """A word cut into as few pieces as fit; at least one character each."""
    pieces = []
    while word:
        length = next((n for n in range(len(word), 1, -1) if _fits(word[:n], width_px)), 1)
        pieces.append(word[:length])
        word = word[length:]
    return pieces


def _fits(text: str, width_px: int) -> bool:
    return _font().getlength(text) <= width_px


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_PX)
