"""Contact sheets: every picture where it belongs, every prompt readable."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.inference import grid
from megatron_nucleus.inference.grid import CELL_PX, GAP_PX, contact_sheet, fit, wrap
from megatron_nucleus.utils.errors import ConfigError

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]


def solid(colour, size=(32, 32)):
    return Image.new("RGB", size, colour)


def test_pictures_stand_in_reading_order():
    sheet = contact_sheet([solid(c) for c in COLOURS], columns=3)
    step = CELL_PX + GAP_PX
    for i, colour in enumerate(COLOURS):
        centre = (GAP_PX + (i % 3) * step + CELL_PX // 2, GAP_PX + (i // 3) * step + CELL_PX // 2)
        assert sheet.getpixel(centre) == colour
    assert sheet.getpixel((GAP_PX + 2 * step + 50, GAP_PX + step + 50)) == (255, 255, 255)  # the sixth cell


def test_small_pictures_keep_every_pixel():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    big = np.asarray(fit(Image.fromarray(pixels), 64))
    assert np.array_equal(big, pixels.repeat(16, 0).repeat(16, 1))


def test_large_and_uneven_pictures_are_centred_whole():
    sheet = contact_sheet([solid(COLOURS[0], (400, 100)), solid(COLOURS[1], (100, 400))], columns=2)
    assert sheet.getpixel((GAP_PX + CELL_PX // 2, GAP_PX + CELL_PX // 2)) == COLOURS[0]
    assert sheet.getpixel((GAP_PX + CELL_PX // 2, GAP_PX + 10)) == (255, 255, 255)
    assert sheet.getpixel((2 * GAP_PX + CELL_PX + CELL_PX // 2, GAP_PX + 10)) == COLOURS[1]


def test_captions_are_drawn_under_their_picture():
    plain = contact_sheet([solid(COLOURS[0])] * 2, columns=2)
    sheet = contact_sheet([solid(COLOURS[0])] * 2, ["a red square", ""], columns=2)
    assert sheet.height > plain.height
    under = np.asarray(sheet.convert("L"))[GAP_PX + CELL_PX + 2 : sheet.height - GAP_PX]
    assert (under[:, GAP_PX : GAP_PX + CELL_PX] < 100).sum() > 30  # ink
    assert (under[:, 2 * GAP_PX + CELL_PX :] < 100).sum() > 30  # (no prompt)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle to the left of a blue square and above a green triangle",
        "w" * 200,
        "x " + "unbreakable" * 5,
        "三个红色的圆形在一个蓝色的正方形的左边,没有空格",
    ],
)
def test_wrapping_loses_nothing_and_fits(text):
    lines = wrap(text, CELL_PX, max_lines=100)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(grid._font().getlength(line) <= CELL_PX for line in lines)


def test_long_text_ends_in_an_ellipsis():
    lines = wrap("many words " * 50, CELL_PX)
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert all(grid._font().getlength(line) <= CELL_PX for line in lines)
    assert wrap("", CELL_PX) == ["(no prompt)"]


def test_bad_calls():
    with pytest.raises(ConfigError, match="at least one picture"):
        contact_sheet([])
    with pytest.raises(ConfigError, match="2 pictures was given 1 captions"):
        contact_sheet([solid(COLOURS[0])] * 2, ["one"])
