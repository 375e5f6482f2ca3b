"""Hashes and measures of pictures: against plain references, and what must not change them."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from megatron_nucleus.data import images
from megatron_nucleus.data.curation import measures
from megatron_nucleus.data.curation.measures import Measures, draft_size, look, measure, sample_colours

PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "china.jpg",
               "flower.jpg")  # fmt: skip


def measured(picture: Image.Image, size_px: tuple[int, int] | None = None) -> Measures:
    glance = look(picture.convert("L"), size_px or picture.size)
    return measure([glance._replace(colours=sample_colours(picture.convert("RGB")))])[0]


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def of_file(payload: bytes) -> Measures:
    header = images.open_image(payload)
    size = header.size
    return measure([look(images.decode_opened(header, draft_size(size), grey=True).image, size)])[0]


@pytest.fixture(scope="module")
def photographs(photos) -> dict[str, Image.Image]:
    return {name: photos[name].convert("RGB") for name in PHOTOGRAPHS}


def plain_dct_bits(levels: np.ndarray, count: int) -> np.ndarray:
    """By the definition, with cosines and loops: frequencies 1..count above their median."""
    n = len(levels)
    position = np.arange(n)
    out = np.empty((count, count))
    for v, u in itertools.product(range(1, count + 1), repeat=2):
        down = np.cos(np.pi * v * (2 * position + 1) / (2 * n))
        across = np.cos(np.pi * u * (2 * position + 1) / (2 * n))
        out[v - 1, u - 1] = down @ levels.astype(float) @ across
    return (out > np.median(out)).ravel()


def test_hashes_equal_a_plain_dct_bit_for_bit():
    rng = np.random.default_rng(0)
    for _ in range(12):
        levels = rng.integers(0, 256, (64, 64), dtype=np.uint8)
        small = levels.reshape(32, 2, 32, 2).sum((1, 3))
        want = int("".join("01"[int(bit)] for bit in plain_dct_bits(small, 8)), 2)
        assert int(measures.phash(levels[None])[0]) == want
        assert measures.phash256(levels[None])[0] == np.packbits(plain_dct_bits(levels, 16)).tobytes()
        assert want.bit_count() == 32  # a median splits in halves


def test_no_sum_of_a_hash_is_rounded():
    for side, count, highest in ((64, 16, 255), (32, 8, 4 * 255)):
        rows = np.abs(measures._dct_rows(side, count))
        assert (rows == np.rint(rows)).all()
        assert highest * rows.sum(1).max() ** 2 < 2**53


def test_a_flat_picture_has_an_empty_hash_and_no_measure_above_0():
    got = measured(Image.new("RGB", (300, 400), (90, 20, 200)))
    assert (got.phash, got.phash256) == (0, bytes(32))
    assert got.dominant_colour_share == 1
    zeros = (got.luma_std, got.chroma_std, got.laplacian_variance, got.high_frequency_share)
    assert zeros == pytest.approx((0, 0, 0, 0), abs=1e-3)


def distances(a: Measures, b: Measures) -> tuple[int, int]:
    long = int.from_bytes(a.phash256, "big") ^ int.from_bytes(b.phash256, "big")
    return (a.phash ^ b.phash).bit_count(), long.bit_count()


def test_hashes_stay_when_a_photograph_is_resized_or_compressed_and_differ_between_photographs(photographs):
    originals = {name: measured(picture) for name, picture in photographs.items()}
    near = []
    for name, picture in photographs.items():
        for factor in (0.5, 0.7, 1.3, 2.0):
            size = round(picture.width * factor), round(picture.height * factor)
            near.append(distances(originals[name], measured(picture.resize(size, Image.Resampling.BICUBIC))))
        near.append(distances(originals[name], of_file(encoded(picture, "JPEG", quality=60))))
        near.append(distances(originals[name], of_file(encoded(picture, "WEBP", quality=60))))
    short, long = np.array(near).T
    assert (short <= 4).mean() >= 0.95  # measured: 1.00
    assert (long <= 31).all()
    far = [distances(a, b) for a, b in itertools.combinations(originals.values(), 2)]
    assert min(d for d, _ in far) >= 16
    assert min(d for _, d in far) >= 80


def test_what_a_picture_measures_does_not_depend_on_the_others(photographs):
    glances = [
        look(p.convert("L").resize((300 + 29 * n, 280 + 31 * n)), (n, n))
        for n, p in enumerate(photographs.values())
    ]
    glances[3] = glances[3]._replace(colours=sample_colours(photographs["coffee.png"]))
    alone = [measure([glance])[0] for glance in glances]
    assert measure(glances) == alone
    assert measure(glances[::-1] * 3) == (alone[::-1]) * 3
    assert measure([]) == []


def by_convolution(picture: Image.Image) -> tuple[float, float]:
    """Both measures of sharpness of the whole picture at shortest side 256 px, by the plain definitions."""
    scale = 256 / min(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    a = np.asarray(picture.convert("L").resize(size, Image.Resampling.LANCZOS)).astype(float)
    laplacian = a[:-2, 1:-1] + a[2:, 1:-1] + a[1:-1, :-2] + a[1:-1, 2:] - 4 * a[1:-1, 1:-1]
    power = np.abs(np.fft.fft2(a - a.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(a.shape[0])[:, None], np.fft.fftfreq(a.shape[1])[None])
    return laplacian.var(), power[frequency > 0.25].sum() / power.sum()


@pytest.mark.parametrize("side_px", [256, 340, 450, 511, 512, 900])
def test_sharpness_is_that_of_a_picture_of_256_px_whatever_its_size(side_px):
    """On noise of one character all over: tiles then see what the whole picture has."""
    rng = np.random.default_rng(side_px)
    noise = Image.fromarray(rng.normal(128, 40, (900, 1200)).clip(0, 255).astype(np.uint8))
    picture = noise.filter(ImageFilter.GaussianBlur(4)).resize(
        (side_px * 4 // 3, side_px), Image.Resampling.LANCZOS
    )
    laplacian, share = by_convolution(picture)
    got = measured(picture)
    assert got.laplacian_variance == pytest.approx(laplacian, rel=0.25)
    assert got.high_frequency_share == pytest.approx(share, rel=0.4)


def test_sharpness_of_photographs_is_near_the_plain_definitions(photographs):
    got = np.array(
        [(m.laplacian_variance, m.high_frequency_share) for m in map(measured, photographs.values())]
    )
    want = np.array([by_convolution(picture) for picture in photographs.values()])
    ratios = np.exp(np.abs(np.log(got / want)))
    assert np.median(ratios, axis=0).max() < 1.6  # tiles see a part of it; limits on blur are factors away
    assert ratios.max() < 5


@pytest.mark.parametrize("period_px", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("side_px", [256, 320, 384, 512, 1024])
def test_a_regular_pattern_does_not_look_empty(period_px, side_px):
    line = (np.arange(side_px) // (period_px // 2) % 2 * 255).astype(np.uint8)
    got = measured(Image.fromarray(np.repeat(line[None], side_px, 0)))
    flattened = side_px // 256 >= period_px  # the reduced version is one grey
    assert (got.luma_std < 3.5) == flattened
    assert got.dominant_colour_share == 1 if flattened else got.dominant_colour_share < 0.7


def test_thin_lines_do_not_look_empty():
    paper = np.full((512, 512), 255, np.uint8)
    paper[8:505:62] = 0  # between the samples
    assert measured(Image.fromarray(paper)).luma_std > 10


def test_emptiness_of_known_pictures():
    half = Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 128)[None].repeat(256, 0)).convert("RGB")
    got = measured(half)
    assert (got.luma_std, got.chroma_std) == pytest.approx((127.5, 0))
    assert got.dominant_colour_share == pytest.approx(0.5, abs=0.02)
    rng = np.random.default_rng(0)
    between = Image.fromarray(
        rng.integers(120, 136, (256, 256, 3), dtype=np.uint8)
    )  # across the border of two bins
    assert measured(between).dominant_colour_share == 1
    red_blue = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(256, 0).repeat(128, 1))
    cb, cr = np.array([[-43.0, 127.5], [127.5, -20.7]])  # JFIF, red and blue
    assert measured(red_blue).chroma_std == pytest.approx(np.hypot(cb.std(), cr.std()), abs=0.1)


def test_colour_is_asked_for_wherever_one_colour_can_prevail(photographs):
    rng = np.random.default_rng(3)
    for _ in range(60):
        rgb = np.full((256, 256, 3), rng.integers(0, 225, 3), np.uint8)
        rgb += rng.integers(0, 32, rgb.shape, dtype=np.uint8)  # all in one cube of 32 levels
        other = rng.random((256, 256)) < rng.uniform(0, 0.045)
        rgb[other] = rng.integers(0, 256, (other.sum(), 3), dtype=np.uint8)
        picture = Image.fromarray(rgb)
        assert measures.of_one_lightness([look(picture.convert("L"), picture.size)]) == [True]
    glances = [look(p.convert("L"), p.size) for p in photographs.values()]
    assert not any(measures.of_one_lightness(glances))
    assert measure(glances[:1])[0][5:7] == (None, None)


def test_pixel_keys_of_equal_pictures(photographs):
    picture = photographs["china.jpg"]
    plain, tagged = (
        encoded(picture, "JPEG", quality=90),
        encoded(picture, "JPEG", quality=90, comment=b"another file"),
    )
    assert plain != tagged
    assert of_file(plain).pixel_key == of_file(tagged).pixel_key
    assert of_file(encoded(picture, "PNG")).pixel_key == of_file(encoded(picture, "BMP")).pixel_key
    keys = {of_file(encoded(p, "PNG")).pixel_key for p in (
        picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture.resize((641, 427)),
        picture.point(lambda v: min(v + 3, 255)))}  # fmt: skip
    assert len(keys) == 4
    assert measured(picture, (10, 20)).pixel_key != measured(picture, (20, 10)).pixel_key


def test_a_jpeg_decodes_to_256_up_to_512_px_and_to_nearly_the_same_hash(photographs):
    for side in (1, 100, 255, 256, 511, 512, 900, 1023, 1024, 1067, 2047, 2048, 8096):
        for long in (side, side * 4 // 3, 3 * side - 1):
            width, height = draft_size((long, side))
            scale = min(long // max(width, 1), side // height)  # Pillow takes the next of 1, 2, 4, 8 below
            stored = -(-side // max(s for s in (1, 2, 4, 8) if s <= scale))
            assert stored == side if side < 512 else 256 <= stored <= (512 if side < 4096 else 1012)
    for name, picture in photographs.items():
        payload = encoded(
            picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.BICUBIC), "JPEG"
        )
        full = images.decode(payload).image
        assert distances(of_file(payload), measured(full))[0] <= 2, name


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 300), (23, 24), (31, 256), (64, 4000)])
def test_small_pictures_are_measured_as_they_are(size):
    rng = np.random.default_rng(0)
    got = measured(Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)))
    assert np.isfinite(got[4:]).all()
    assert 0 <= got.high_frequency_share <= 1
    assert 0 <= got.luma_std <= 127.5
