"""Image statistics: known values, published anchors, order and invariances."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from megatron_nucleus.data import images
from megatron_nucleus.data.curation.scorers import statistics
from megatron_nucleus.data.curation.scorers.protocol import reduced
from megatron_nucleus.data.curation.scorers.statistics import MEASURES, ImageStatistics, measure

SCORER = ImageStatistics()


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))


def flat(*rgb: int, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), rgb)


def named(image: Image.Image) -> dict[str, float]:
    return dict(zip(MEASURES, measure(image).tolist(), strict=True))


def score(image: Image.Image) -> float:
    return SCORER.score([image], [()])[0].value


def test_flat_pictures_have_known_values():
    grey = named(flat(128, 128, 128))
    assert grey["contrast"] == pytest.approx(0, abs=1e-12)
    assert grey["colourfulness"] == grey["sharpness"] == grey["entropy"] == 0
    assert grey["exposure"] == pytest.approx(1 - 0.5 / 127.5)
    assert named(flat(0, 0, 0))["exposure"] == pytest.approx(0, abs=1e-12)
    assert named(flat(255, 255, 255))["exposure"] == pytest.approx(0, abs=1e-12)
    # Pure red: rg = 255, yb = 127.5, both constant, so the measure is 0.3 * |(255, 127.5)|.
    red = 0.3 * math.hypot(255, 127.5)
    assert named(flat(255, 0, 0))["colourfulness"] == pytest.approx(red / (red + 45))


def test_a_black_and_white_edge_has_known_values():
    pixels = np.zeros((64, 64, 3))
    pixels[:, 32:] = 255
    found = named(picture(pixels))
    assert found["contrast"] == pytest.approx(1)
    assert found["exposure"] == pytest.approx(1)
    assert found["entropy"] == pytest.approx(1 / 8)  # two equally likely values: one bit of eight
    # Of 62 inner columns two have a Laplacian, +255 and -255: variance 2 * 255^2 / 62.
    detail = 2 * 255**2 / 62
    assert found["sharpness"] == pytest.approx(detail / (detail + 1000))


def test_colourfulness_and_detail_agree_with_independent_computations(photos):
    for image in (photos["coffee.png"], photos["chelsea.png"]):
        rgb = np.asarray(image.convert("RGB"), dtype=np.float64)
        red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
        opponent = np.stack([(red - green).ravel(), (0.5 * (red + green) - blue).ravel()])
        expected = np.sqrt(np.cov(opponent, ddof=0).trace()) + 0.3 * np.linalg.norm(opponent.mean(axis=1))
        assert statistics.colourfulness(rgb) == pytest.approx(expected)
        luma = rgb @ [0.299, 0.587, 0.114]
        laplacian = ndimage.laplace(luma)[1:-1, 1:-1]
        assert statistics.laplacian_variance(luma) == pytest.approx(laplacian.var())


def test_entropy_of_all_grey_values_is_full():
    ramp = np.repeat(np.arange(256).reshape(16, 16)[..., None], 3, axis=2)
    assert named(picture(ramp))["entropy"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "china.jpg", "flower.jpg"])
def test_blurred_washed_out_and_dark_pictures_score_less(photos, name):
    image = photos[name].convert("RGB")
    pixels = np.asarray(image, dtype=np.float64)
    whole = named(image)
    blurred = image.filter(ImageFilter.GaussianBlur(6))
    washed_out, dark, grey = picture(110 + pixels * 0.15), picture(pixels * 0.1), image.convert("L")
    assert named(blurred)["sharpness"] < 0.5 * whole["sharpness"]
    assert named(washed_out)["contrast"] == pytest.approx(0.15 * whole["contrast"], rel=0.02)
    assert named(dark)["exposure"] < whole["exposure"]
    assert named(grey)["colourfulness"] == 0 < whole["colourfulness"]
    assert max(map(score, (blurred, washed_out, dark, grey))) < score(image)


def test_mirrored_turned_and_reduced_pictures_score_the_same(photos):
    image = photos["china.jpg"].convert("RGB")
    whole = measure(image)
    for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_90):
        assert measure(image.transpose(turn)) == pytest.approx(whole, abs=2e-3)
    large = image.resize((1920, 1281), Image.Resampling.LANCZOS)
    assert reduced(large, SCORER.side_px).size == (960, 641)
    assert measure(reduced(large, SCORER.side_px)) == pytest.approx(measure(large), abs=0.02)


def test_a_draft_decode_scores_as_a_full_one(photos):
    for size, decoded in (((2560, 1708), (1280, 854)), ((1800, 1201), (900, 601))):
        buffer = io.BytesIO()
        photos["china.jpg"].resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=92)
        full = images.decode(buffer.getvalue()).image
        draft = images.decode(buffer.getvalue(), draft_px=(768, 512)).image
        assert (draft.size, full.size) == (decoded, size)
        assert measure(draft) == pytest.approx(measure(full), abs=0.03)


def test_values_lie_between_0_and_1_and_do_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    heap = [picture(rng.integers(0, 256, (h, w, 3))) for h, w in ((1, 1), (2, 300), (300, 7), (64, 64))]
    heap += [flat(255, 255, 255), flat(0, 0, 0), flat(0, 0, 255, side=1)]
    vectors = SCORER.embed(heap)
    assert vectors.dtype == np.float32
    assert vectors.min() >= -1e-6
    assert vectors.max() <= 1
    alone = np.concatenate([SCORER.embed([image]) for image in heap])
    assert np.array_equal(vectors, alone)
    assert [s.value for s in SCORER.score(heap, [()] * len(heap))] == pytest.approx(vectors.mean(axis=1))
    assert SCORER.embed([]).shape == (0, 5)
