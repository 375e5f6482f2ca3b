"""The bucket report: its figures against sizes worked out by hand, and against the loader's own crop."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data.bucket_report import bucket_report, format_report
from megatron_nucleus.data.buckets import BucketSize, size
from megatron_nucleus.data.crop_tally import CROP_LABELS, CropTally
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.encode import EncodeConfig, encode_corpus
from megatron_nucleus.data.encoders import DctCodec, NgramTextEncoder
from megatron_nucleus.data.images import crop_box
from megatron_nucleus.data.index import INDEX_SCHEMA, iter_rows
from megatron_nucleus.data.loader import DataConfig, build_loader
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.corpora import make_encoded
from tests.data.curation.helpers import make_settings

CONFIG = DataConfig(data_path="unused", resolution_px=64, num_workers=0, bucket_batch_multiple=2)


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """30 pictures of many shapes, with tiers, through the real curation."""
    source, output = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("made") / "out"
    shapes = [(64, 64), (200, 200), (70, 64), (130, 64), (64, 150), (90, 66), (300, 200), (64, 80)]
    rng = np.random.default_rng(0)
    for i in range(30):
        pixels = rng.integers(0, 256, (*shapes[i % 8][::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / f"{i:02d}.png")
        side = {"caption": f"noise {i}", "tier": f"A{1 + i % 5}", "episode_bucket": f"B{1 + i % 8}"}
        (source / f"{i:02d}.json").write_text(json.dumps(side if i else {"caption": "noise 0"}))
    (source / "bad.png").write_bytes((source / "01.png").read_bytes()[:-3] + b"abc")
    (source / "bad.json").write_text('{"caption": "x", "tier": "gold"}')
    result = curate(source, output, make_settings(min_bucket_images=4))
    return output, result


def index_rows(folder):
    return [
        row for path in sorted((folder / "index").glob("*.parquet")) for row in iter_rows(path, INDEX_SCHEMA)
    ]


def test_the_figures_are_those_of_the_images_one_by_one(curated):
    output, result = curated
    corpus = open_corpus(output, held_out_samples=3)
    report = bucket_report(corpus, CONFIG, 8, global_batch_size=12)
    assert {row["bucket"]: row["images"] for row in report} == result["buckets"]
    images = index_rows(output)
    assert result["merged_buckets"]  # some bucket was small
    for row in report:
        width, height = size(row["bucket"], 64, 8)
        mine = [(r["width_px"], r["height_px"]) for r in images if r["aspect_bucket"] == row["bucket"]]
        cropped = []
        for w, h in mine:
            left, top, right, bottom = crop_box(w, h, width / height)
            cropped.append(1 - (right - left) * (bottom - top) / (w * h))
        assert (row["width_px"], row["height_px"], row["tokens"]) == (width, height, width * height // 64)
        assert row["cropped_mean_frac"] == pytest.approx(np.mean(cropped), abs=1e-12)
        assert row["cropped_max_frac"] == pytest.approx(max(cropped), abs=1e-12)
        assert row["enlarged"] == sum(w < width or h < height for w, h in mine)
        assert sum(row["cropped_histogram"].values()) == row["images"]
        assert row["cropped_histogram"]["none"] == sum(c < 0.001 for c in cropped)
        assert row["cropped_histogram"]["to 20 %"] == sum(0.1 <= c < 0.2 for c in cropped)
        assert row["merged_from"] == sorted(
            s for s, t in result["merged_buckets"].items() if t == row["bucket"]
        )
    with build_loader(CONFIG, corpus, seed=0, global_batch_size=12, multiple_px=8) as loader:
        drawn = {batch.bucket: batch.step_samples for batch in (next(loader) for _ in range(20))}
    assert {row["bucket"]: row["batch_samples"] for row in report} == drawn
    assert {row["batch_samples"] for row in bucket_report(corpus, CONFIG, 8)} == {None}


def test_the_text_table_has_a_line_per_bucket_and_the_sums(curated):
    report = bucket_report(open_corpus(curated[0]), CONFIG, 8, global_batch_size=12)
    lines = format_report(report).splitlines()
    assert len(lines) == 2 + len(report)
    assert lines[0].split()[:3] == ["bucket", "size", "images"]
    for row, line in zip(report, lines[1:], strict=False):
        words = line.split()
        assert words[:5] == [
            *(row["bucket"], f"{row['width_px']}x{row['height_px']}"),
            *(str(row["images"]), str(row["tokens"]), str(row["batch_samples"])),
        ]
        assert f"{row['cropped_mean_frac']:.1%}" in words
        assert set(row["merged_from"]) <= {word.strip(",") for word in words}
    assert lines[-1].split()[:2] == ["all", "30"]


def test_report_html_shows_the_same_at_the_published_sizes(curated):
    output, _ = curated
    page = (output / "report.html").read_text()
    assert "How the images fit their buckets" in page
    corpus = open_corpus(output)
    config = DataConfig(data_path="unused", resolution_px=1024)
    for row in bucket_report(corpus, config, 16):
        cells = [row["images"], row["enlarged"]]
        cells += [f"{100 * row['cropped_mean_frac']:.1f} %", f"{100 * row['cropped_max_frac']:.1f} %"]
        cells += list(row["cropped_histogram"].values())
        start = f'<tr><td>{row["bucket"]}</td><td class="n">{cells[0]}</td><td class="n">{cells[1]}'
        found = page[page.index(start) :].split("</tr>")[0].replace("\n", "")
        want = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        assert want in found
        assert ", ".join(row["merged_from"]) in found


def test_tiers_go_from_the_sidecar_to_the_corpus(curated):
    output, result = curated
    assert result["quarantined"] == {"bad_tier": 1}
    corpus = open_corpus(output)
    for row in range(len(corpus)):
        sample = corpus.read(row)
        number = int(sample.captions[0].text.split()[1])
        want = (f"A{1 + number % 5}", f"B{1 + number % 8}") if number else (None, None)
        assert (corpus.tier(row), corpus.episode(row)) == want
        assert (sample.info.get("tier"), sample.info.get("episode_bucket")) == want


def test_pieces_add_up_and_nothing_is_below_the_first_bin():
    rng = np.random.default_rng(1)
    width, height = rng.integers(300, 4000, (2, 5000))
    sizes = {"1344x768": BucketSize(1344, 768, 4032)}
    whole, parts = CropTally(sizes), CropTally(sizes)
    whole.add("1344x768", width, height)
    for part in np.array_split(np.arange(5000), 7):
        parts.add("1344x768", width[part], height[part])
    (a,), (b,) = whole.rows({}), parts.rows({})
    assert a["cropped_mean_frac"] == pytest.approx(b["cropped_mean_frac"])
    for key in ("images", "enlarged", "cropped_max_frac", "cropped_histogram"):
        assert a[key] == b[key]
    assert sum(a["cropped_histogram"].values()) == 5000
    assert list(a["cropped_histogram"]) == list(CROP_LABELS)


def test_encoded_data_is_measured_at_its_own_resolution(tmp_path, curated):
    make_encoded(tmp_path / "d", multiple_px=8)
    with pytest.raises(DataError, match="an image without width_px and height_px"):
        bucket_report(open_corpus(tmp_path / "d"), CONFIG, 1)
    make_encoded(tmp_path / "old")
    with pytest.raises(ConfigError, match="run tools/encode.py again"):
        bucket_report(open_corpus(tmp_path / "old"), CONFIG, 1)
    encode_corpus(
        curated[0],
        tmp_path / "e",
        DctCodec(),
        NgramTextEncoder(),
        EncodeConfig(),
        resolution_px=32,
        patch_size=2,
    )
    encoded, images = open_corpus(tmp_path / "e"), open_corpus(curated[0])
    config = DataConfig(data_path="unused", resolution_px=32)
    assert bucket_report(encoded, CONFIG, 1) == bucket_report(images, config, 8)
    for row in range(len(images)):  # tiers and episode buckets are carried through
        assert encoded.id(row) == images.id(row)
        assert (encoded.tier(row), encoded.episode(row)) == (images.tier(row), images.episode(row))
