"""Empty and blurred pictures fall, photographs stay: the figures behind the defaults."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from megatron_nucleus.data.curation.stage import Drop
from megatron_nucleus.data.curation.stages.blank import BlankConfig, blank
from megatron_nucleus.data.curation.stages.blur import BlurConfig, blur
from megatron_nucleus.data.curation.stages.inspect import InspectConfig, inspect
from megatron_nucleus.utils.errors import ConfigError
from tests.data.curation.one_image import encoded, row_of

PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "china.jpg",
               "flower.jpg", "coins.png", "brick.png", "grass.png", "gravel.png", "moon.png",
               "hubble_deep_field.jpg")  # fmt: skip


@pytest.fixture(scope="module")
def photographs(photo_files) -> dict[str, Image.Image]:
    folder = photo_files["camera.png"].parent
    files = {name: photo_files.get(name, folder / name) for name in PHOTOGRAPHS}
    pictures = {name: Image.open(path).convert("RGB") for name, path in files.items()}
    return {
        name: picture.reduce(2) if min(picture.size) > 800 else picture for name, picture in pictures.items()
    }


@pytest.fixture
def verdicts(tmp_path) -> Callable[[Image.Image], tuple[str | None, str | None]]:
    """Picture -> reasons of both stages, by the columns that the first stage makes."""

    def judge(picture: Image.Image, format: str = "PNG") -> tuple[str | None, str | None]:
        row = row_of(tmp_path, encoded(picture, format))
        (found,) = inspect.function([row], InspectConfig(require_captions=False, min_side_px=200))
        assert not isinstance(found, Drop), found
        reasons = []
        for stage, config in ((blank, BlankConfig()), (blur, BlurConfig())):
            (result,) = stage.function([found], config)
            reasons.append(result.reason if isinstance(result, Drop) else None)
            assert result == {} or stage.verdict(result.reason) == "rejected"
        return reasons[0], reasons[1]

    return judge


def test_no_photograph_falls_in_colour_or_grey_at_any_size(photographs, verdicts):
    for name, picture in photographs.items():
        assert verdicts(picture) == (None, None), name
        assert verdicts(picture.convert("L")) == (None, None), name
    for side in (256, 400, 511, 900):
        for name in ("astronaut.png", "flower.jpg", "moon.png", "retina.jpg"):
            picture = photographs[name]
            size = (side * picture.width // min(picture.size), side * picture.height // min(picture.size))
            assert verdicts(picture.resize(size, Image.Resampling.LANCZOS), "JPEG") == (None, None), (
                name,
                side,
            )


def test_sepia_is_not_one_colour(photographs, verdicts):
    grey = np.asarray(photographs["camera.png"].convert("L")).astype(float)
    sepia = np.stack([grey, grey * 0.8, grey * 0.6], -1).astype(np.uint8)
    assert verdicts(Image.fromarray(sepia)) == (None, None)


def test_blurred_photographs_fall(photographs, verdicts):
    for name, picture in photographs.items():
        for part_of_side in (0.008, 0.03):
            soft = picture.filter(ImageFilter.GaussianBlur(part_of_side * min(picture.size)))
            assert verdicts(soft)[1] == "blurry", (name, part_of_side)


def test_slightly_soft_photographs_stay(photographs, verdicts):
    for name, picture in photographs.items():
        soft = picture.filter(ImageFilter.GaussianBlur(0.001 * min(picture.size)))
        assert verdicts(soft)[1] is None, name


def test_photographs_enlarged_from_nearly_nothing_fall(photographs, verdicts):
    fallen = []
    for picture in photographs.values():
        scale = 48 / min(picture.size)
        small = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        fallen.append(verdicts(small.resize(picture.size, Image.Resampling.BICUBIC))[1] == "blurry")
    assert all(fallen)


@pytest.mark.parametrize("name", ["astronaut.png", "china.jpg", "coffee.png", "flower.jpg", "camera.png"])
@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.5, 0.1)])
def test_a_sharp_subject_before_a_blurred_background_stays(photographs, verdicts, name, corner):
    """A quarter of the area in focus, wherever it is."""
    picture = photographs[name]
    soft = picture.filter(ImageFilter.GaussianBlur(0.02 * min(picture.size)))
    left, top = (round(part * side) for part, side in zip(corner, picture.size, strict=True))
    box = (left, top, left + picture.width // 2, top + picture.height // 2)
    soft.paste(picture.crop(box), box)
    assert verdicts(soft) == (None, None)


def drawing(
    background: object, draw: Callable[[ImageDraw.ImageDraw], object] = lambda canvas: None
) -> Image.Image:
    picture = Image.new("RGB", (512, 512), background)
    draw(ImageDraw.Draw(picture))
    return picture


def star(canvas: ImageDraw.ImageDraw, x: int, y: int) -> None:
    canvas.rectangle((x, y, x + 3, y + 3), "white")


def noisy(level: int, std: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(level, std, (400, 400, 3))
    return Image.fromarray(noise.round().clip(0, 255).astype(np.uint8))


EMPTY = {
    "white": (drawing("white"), "blank"),
    "black": (drawing("black"), "blank"),
    "navy": (drawing("navy"), "blank"),
    "between two bins": (drawing((127, 128, 16)), "blank"),
    "sensor noise on grey": (noisy(128, 2.5), "blank"),
    "faint gradient": (Image.linear_gradient("L").point(lambda v: 120 + v // 32).resize((400, 400)), "blank"),
    "a dot on white": (drawing("white", lambda c: c.ellipse((300, 300, 340, 340), "black")), "near_monochrome"),
    "a word": (drawing("white", lambda c: c.text((60, 250), "nothing", "black", font_size=30)), "near_monochrome"),
    "a small logo": (drawing("white", lambda c: c.rectangle((230, 230, 280, 280), "red")), "near_monochrome"),
    "sparse stars": (drawing("black", lambda c: [star(c, 37 * n % 509, 91 * n % 503) for n in range(60)]),
                     "near_monochrome"),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_empty_pictures_fall(verdicts, name):
    picture, reason = EMPTY[name]
    assert verdicts(picture)[0] == reason
    assert verdicts(picture, "JPEG")[0] == reason


def test_simple_graphics_stay(verdicts):
    def boxes(canvas: ImageDraw.ImageDraw) -> None:
        for n in range(6):
            canvas.rectangle((40 + 75 * n, 400 - 50 * n, 90 + 75 * n, 460), (40 * n, 90, 200 - 30 * n))

    stripes = Image.fromarray(np.tile(np.repeat(np.array([0, 255], np.uint8), 4), (256, 32)))
    same_lightness = drawing(
        (255, 0, 0), lambda c: c.rectangle((0, 0, 256, 512), (0, 130, 0))
    )  # luminance 76
    assert verdicts(drawing("white", boxes)) == (None, None)
    assert verdicts(stripes) == (None, None)
    assert verdicts(same_lightness)[0] is None


def test_a_gradient_is_blurry_not_blank(verdicts):
    for picture in (
        Image.linear_gradient("L").resize((600, 600)),
        Image.radial_gradient("L").resize((600, 600)),
    ):
        assert verdicts(picture) == (None, "blurry")


def test_limits_are_settings_and_0_turns_them_off():
    empty = {"luma_std": 0.0, "chroma_std": 0.0, "dominant_colour_share": 1.0}
    assert blank.function([empty], BlankConfig(min_luma_std=0, max_dominant_share=1)) == [{}]
    soft = {"laplacian_variance": 6.0, "high_frequency_share": 0.0}
    assert blur.function([soft], BlurConfig(min_high_frequency_share=0)) == [{}]
    assert blur.function([soft], BlurConfig(min_laplacian_variance=6.0)) == [{}]
    (dropped,) = blur.function([soft], BlurConfig())
    assert "6.0" in dropped.detail
    nothing = {"laplacian_variance": 0.0, "high_frequency_share": 0.0}
    assert blur.function([nothing], BlurConfig(min_laplacian_variance=0)) == [{}]


@pytest.mark.parametrize(
    ("config", "knobs"),
    [(BlankConfig, {"min_luma_std": -1}), (BlankConfig, {"min_luma_std": 4}), (BlankConfig, {"min_chroma_std": 200}),
     (BlankConfig, {"max_dominant_share": 0.9}), (BlankConfig, {"max_dominant_share": float("nan")}),
     (BlurConfig, {"min_laplacian_variance": -1}), (BlurConfig, {"min_laplacian_variance": float("nan")}),
     (BlurConfig, {"min_high_frequency_share": 2})],
)  # fmt: skip
def test_settings_outside_their_range_are_refused(config, knobs):
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        config(**knobs)
