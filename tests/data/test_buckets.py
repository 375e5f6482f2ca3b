"""Aspect buckets: the published sizes, multiples, least crop, and merging of small buckets."""

from __future__ import annotations

import math

import pytest

from megatron_nucleus.data import buckets
from megatron_nucleus.data.buckets import BUCKETS, assign, kept_frac, merge_small, ratio, size
from megatron_nucleus.data.images import crop_box
from megatron_nucleus.utils.errors import ConfigError

PUBLISHED = ["1024x1024", "1344x768", "768x1344", "1184x896", "896x1184", "1248x832", "832x1248"]


@pytest.mark.parametrize("multiple", [16, 32])
def test_the_1024_class_is_the_published_list(multiple):
    assert [f"{w}x{h}" for w, h in (size(b, 1024, multiple) for b in BUCKETS)] == PUBLISHED


@pytest.mark.parametrize(
    ("base", "multiple"), [(1024, 16), (512, 16), (256, 16), (128, 8), (64, 8), (32, 8), (32, 4)]
)
def test_sizes_are_multiples_near_the_area_and_the_ratio(base, multiple):
    for bucket in BUCKETS:
        width, height = size(bucket, base, multiple)
        assert width % multiple == height % multiple == 0
        # Half a multiple is the most a side can be off, so few multiples per side allow more.
        slack = multiple / base
        assert abs(math.log(width * height / base**2)) <= 0.02 + 1.3 * slack
        assert abs(math.log(width / height / ratio(bucket))) <= 0.02 + 0.8 * slack
        turned = "x".join(reversed(bucket.split("x")))
        assert size(turned, base, multiple) == (height, width)
    assert size("1024x1024", base, multiple) == (base, base)


LANDSCAPE = {
    1024: [(1344, 768), (1184, 896), (1248, 832)],
    512: [(672, 384), (592, 448), (624, 416)],
    256: [(336, 192), (288, 224), (320, 208)],
}


@pytest.mark.parametrize("base", LANDSCAPE)
def test_known_sizes_of_the_three_stages(base):
    wide = LANDSCAPE[base]
    turned = [(height, width) for width, height in wide]
    pairs = [pair for both in zip(wide, turned, strict=True) for pair in both]
    assert [size(b, base, 16) for b in BUCKETS] == [(base, base), *pairs]
    for width, height in wide:  # image tokens: within 2 % of the square bucket's
        assert abs(width * height / base**2 - 1) < 0.02
    table = buckets.__doc__.splitlines()
    for width, height in wide:
        assert any(f"{width}x{height}" in line and str(width * height // 256) in line for line in table)


@pytest.mark.parametrize("multiple", [4, 8, 16, 24, 32])
def test_any_budget_gives_sizes_that_fit(multiple):
    for pieces in (*range(1, 40), 100, 257):
        for bucket in BUCKETS:
            width, height = size(bucket, pieces * multiple, multiple)
            assert width % multiple == height % multiple == 0
            assert min(width, height) >= multiple
            assert (width >= height) == (ratio(bucket) >= 1) or width == height
            assert size("x".join(reversed(bucket.split("x"))), pieces * multiple, multiple) == (height, width)
            if pieces >= 16:
                assert abs(width * height / (pieces * multiple) ** 2 - 1) < 0.07
                assert abs(width / height / ratio(bucket) - 1) < 0.06


@pytest.mark.parametrize(
    ("width", "height", "bucket", "kept"),
    [
        (100_000, 1, "1344x768", 1.75e-5),
        (1, 100_000, "768x1344", 1.75e-5),
        (8096, 257, "1344x768", 257 / 8096 * 1.75),
        (1, 1, "1024x1024", 1.0),
        (65_000, 65_001, "1024x1024", 65_000 / 65_001),
    ],
)
def test_extreme_sizes_have_a_bucket_and_an_honest_crop(width, height, bucket, kept):
    assert assign(width, height) == bucket
    assert kept_frac(width, height, bucket) == pytest.approx(kept, rel=1e-12)


def test_known_sizes_of_small_classes():
    assert [size(b, 32, 8) for b in PUBLISHED[1::2]] == [(40, 24), (32, 24), (40, 24)]  # two may collapse


def test_an_image_goes_where_least_is_cropped():
    assert [assign(*map(int, b.split("x"))) for b in BUCKETS] == list(BUCKETS)
    assert assign(4000, 3000) == "1184x896"
    assert assign(640, 427) == "1248x832"
    assert assign(1080, 1920) == "768x1344"
    assert assign(3000, 1000) == "1344x768"
    for width in range(100, 400, 7):
        for height in (100, 173, 256):
            kept = {b: kept_frac(width, height, b) for b in BUCKETS}
            assert kept[assign(width, height)] == max(kept.values())


def test_kept_frac_is_the_share_of_the_crop_box():
    for width, height, bucket in ((500, 300, "1024x1024"), (300, 500, "1344x768"), (97, 151, "832x1248")):
        left, top, right, bottom = crop_box(width, height, ratio(bucket))
        assert kept_frac(width, height, bucket) == pytest.approx(
            (right - left) * (bottom - top) / (width * height)
        )


def test_small_buckets_join_the_nearest_ratio():
    counts = {"1024x1024": 100, "1344x768": 3, "1248x832": 20, "832x1248": 1, "768x1344": 0}
    final = merge_small(counts, 16)
    assert final == {
        "1024x1024": "1024x1024",
        "1344x768": "1248x832",
        "1248x832": "1248x832",
        "832x1248": "1024x1024",
    }
    assert merge_small(counts, 1) == {b: b for b, n in counts.items() if n}
    chain = merge_small({"1344x768": 1, "1248x832": 1, "1184x896": 1, "1024x1024": 1}, 4)
    assert len(set(chain.values())) == 1  # merged again until the rest is large enough, or one is left
    assert merge_small({"768x1344": 2}, 50) == {"768x1344": "768x1344"}
    assert merge_small({}, 5) == {}


@pytest.mark.parametrize(
    ("bucket", "base", "multiple"), [("1024x1024", 250, 16), ("1024x1024", 0, 8), ("1024x1024", -8, 8)]
)
def test_a_resolution_that_does_not_fit_names_one_that_does(bucket, base, multiple):
    with pytest.raises(
        ConfigError, match=rf"resolution_px {base} is not a positive multiple of {multiple}.*use \d+"
    ):
        size(bucket, base, multiple)


def test_an_unknown_bucket_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 1344x768"):
        size("1344x786", 1024, 16)
