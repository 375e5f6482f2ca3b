"""Curation from end to end on real photographs in every odd form: each is used or listed, and nothing crashes."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from megatron_nucleus.data import images
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.curation.settings import CurationConfig
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.index import INDEX_SCHEMA, QUARANTINE_SCHEMA
from megatron_nucleus.data.loader import DataConfig, build_loader
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.curation.helpers import encode, make_settings, make_tar, table, write_captioned

CONFIG = make_settings(max_shard_bytes=200_000)
REJECTED = {"too_small", "too_large", "extreme_aspect", "exact_duplicate"}


def test_every_item_is_kept_or_listed_with_its_reason(curated, odd_files):
    _, output, result = curated
    verdicts = {row["source_id"]: "kept" for row in table(output / "index", INDEX_SCHEMA)}
    for row in table(output / "quarantine", QUARANTINE_SCHEMA):
        assert row["item"] not in verdicts
        verdicts[row["item"]] = row["reason"]
        assert row["verdict"] == ("rejected" if row["reason"] in REJECTED else "quarantined")
        assert row["detail"]
    expected = {name: verdict for name, (_, verdict) in odd_files.items()}
    # Of two equal files the first by name stays.
    expected["copy_of_plain.jpg"], expected["plain.jpg"] = "kept", "exact_duplicate"
    assert verdicts == expected
    assert result["seen"] == len(odd_files)
    assert result["kept"] == sum(v == "kept" for v in expected.values())
    assert result["seen"] == result["kept"] + sum(result["rejected"].values()) + sum(
        result["quarantined"].values()
    )
    reasons = Counter(v for v in expected.values() if v != "kept")
    assert {**result["rejected"], **result["quarantined"]} == dict(reasons)
    assert set(result["rejected"]) == REJECTED
    # cmyk.jpg still carries the RGB profile of the photograph it was made from.
    assert result["notes"] == {"exif_rotated": 1, "extension_mismatch": 2, "icc_ignored": 1}


def test_shards_hold_the_original_bytes_and_the_index_is_right(curated, odd_files):
    _, output, result = curated
    rows = table(output / "index", INDEX_SCHEMA)
    in_tars = {}
    for path in result["shards"]:
        with tarfile.open(path) as tar:
            for member in tar:
                in_tars[member.name] = tar.extractfile(member).read()
    assert len(in_tars) == 2 * len(rows)
    for row in rows:
        original = odd_files[row["source_id"]][0]
        assert row["id"] == hashlib.sha256(original).hexdigest()
        with open(output / row["tar"], "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["length"]) == original
        decoded = images.decode(original)
        assert (row["width_px"], row["height_px"]) == decoded.image.size
        extension = images.EXTENSIONS[decoded.format]
        assert in_tars[f"{row['id']}.{extension}"] == original
        info = json.loads(in_tars[f"{row['id']}.json"])
        assert [c["text"] for c in info["captions"]] == [c["text"] for c in row["captions"]]
        assert info["source_id"] == row["source_id"]
        assert row["tar"].startswith(f"shards/{row['aspect_bucket']}-")
        assert 0 <= row["partition_key"] <= 999
        assert set(row["stage_versions"]) == {"inspect", "exact_duplicates", "pack"}
    by_name = {row["source_id"]: row for row in rows}
    assert by_name["rotated.jpg"]["exif_orientation"] == 6
    assert (by_name["rotated.jpg"]["width_px"], by_name["rotated.jpg"]["height_px"]) == (300, 451)
    assert by_name["portrait.png"]["aspect_bucket"] == "832x1248"
    assert by_name["rotated.jpg"]["aspect_bucket"] == "832x1248"
    assert by_name["odd_size.png"]["aspect_bucket"] == "1344x768"
    assert sum(result["buckets"].values()) == len(rows)


def test_captions_and_provenance_of_duplicates_move_to_the_kept_one(curated):
    _, output, _ = curated
    row = next(r for r in table(output / "index", INDEX_SCHEMA) if r["source_id"] == "copy_of_plain.jpg")
    assert [c["text"] for c in row["captions"]] == [
        "a picture called copy_of_plain",
        "a picture called plain",
    ]
    assert row["duplicate_cluster"] == row["id"]
    corpus = open_corpus(output)
    sample = next(s for s in map(corpus.read, range(len(corpus))) if s.id == row["id"])
    provenance = {"id": row["id"], "source_id": "plain.jpg", "source_url": None, "licence": "unknown"}
    assert sample.info["duplicates"] == [provenance | {"relation": "exact_duplicate", "distance": None}]
    assert row["duplicates"] == sample.info["duplicates"]
    dropped = next(r for r in table(output / "quarantine", QUARANTINE_SCHEMA) if r["item"] == "plain.jpg")
    assert dropped["sha256"] == row["id"]


def test_of_equal_files_the_licensed_then_the_better_captioned_stays(tmp_path, photos):
    payload = encode(photos["coffee.png"].resize((90, 80)))
    other = encode(photos["coffee.png"].resize((80, 90)))
    source = tmp_path / "in"
    source.mkdir()
    sidecars = {
        "a1": {"captions": ["one", "two", "three"]},
        "a2": {"caption": "four", "license": "CC0-1.0", "url": "u2"},
        "b1": {"caption": "five"},
        "b2": {"captions": ["five", "six"]},
    }
    for name, sidecar in sidecars.items():
        (source / f"{name}.png").write_bytes(payload if name[0] == "a" else other)
        (source / f"{name}.json").write_text(json.dumps(sidecar))
    result = curate(source, tmp_path / "out", CONFIG)
    rows = {r["source_id"]: r for r in table(tmp_path / "out" / "index", INDEX_SCHEMA)}
    assert set(rows) == {"a2.png", "b2.png"}
    assert [c["text"] for c in rows["a2.png"]["captions"]] == ["four", "one", "two", "three"]
    assert [c["text"] for c in rows["b2.png"]["captions"]] == ["five", "six"]
    assert (rows["a2.png"]["licence"], rows["a2.png"]["source_url"]) == ("CC0-1.0", "u2")
    assert result["rejected"] == {"exact_duplicate": 2}


def test_the_loader_gives_every_kept_image(curated, odd_files):
    _, output, result = curated
    corpus = open_corpus(output)
    config = DataConfig(data_path=str(output), resolution_px=64, num_workers=0, caption_drop_frac=0.0)
    seen = {}
    with build_loader(config, corpus, seed=0, global_batch_size=2, multiple_px=8) as loader:
        for _ in range(60):
            batch = next(loader)
            seen.update(zip(batch.ids, zip(batch.texts, batch.pixels_BCHW, strict=True), strict=True))
        assert loader.substituted == 0
    by_id = {hashlib.sha256(payload).hexdigest(): (name, payload) for name, (payload, _) in odd_files.items()}
    assert len(seen) == result["kept"]
    for sample_id, (text, pixels) in seen.items():
        assert text.startswith("a picture called")
        want = images.load_pixels(by_id[sample_id][1], pixels.shape[2], pixels.shape[1])
        assert (pixels.permute(1, 2, 0).numpy() == want).all()


def test_small_buckets_are_merged_and_reported(curated, tmp_path):
    source, _, first = curated
    config = make_settings(min_bucket_images=1000)
    result = curate(source, tmp_path / "out", config)
    assert len(result["buckets"]) == 1
    assert sum(result["buckets"].values()) == first["kept"]
    assert set(result["merged_buckets"]) | set(result["buckets"]) == set(first["buckets"])
    assert open_corpus(tmp_path / "out").buckets == result["buckets"]


def test_tars_and_files_mix_and_damage_ends_one_tar_only(tmp_path, photos):
    source = tmp_path / "in"
    source.mkdir()
    pictures = [encode(photos["rocket.jpg"].resize((100 + i, 80)), "JPEG") for i in range(12)]
    meta = {"url": "https://e.org/x", "caption": "a rocket", "status": "success", "exif": "{}", "key": "0"}
    good = []
    for i in range(4):
        good.append((f"00000000{i}.jpg", pictures[i]))
        good.append((f"00000000{i}.txt", b"a rocket"))
        good.append((f"00000000{i}.json", json.dumps(meta).encode()))
    make_tar(source / "00000.tar", good)
    (source / "00000.parquet").write_bytes(b"stats of the downloader")
    (source / "00000_stats.json").write_text("{}")
    make_tar(
        source / "00001.tar", [(n.replace(".jpg", "b.jpg"), c) for n, c in good[3:]] + [("../x.jpg", b"x")]
    )
    later = [(f"1{i}.{e}", c) for i in range(4, 9) for e, c in (("txt", b"late"), ("jpg", pictures[i]))]
    make_tar(source / "00002.tar", later)
    whole = (source / "00002.tar").read_bytes()
    (source / "00002.tar").write_bytes(whole[: len(whole) // 2])
    (source / "loose.jpg").write_bytes(pictures[10])
    (source / "loose.txt").write_text("on its own")
    result = curate(source, tmp_path / "out", CONFIG)
    assert result["quarantined"]["damaged_tar"] == 1
    assert result["quarantined"]["unsafe_member"] == 1
    assert result["quarantined"]["missing_caption"] == 3  # 00001.tar: '...0b.jpg' has no caption beside it
    assert result["ignored_files"] == 2
    rows = {r["source_id"]: r for r in table(tmp_path / "out" / "index", INDEX_SCHEMA)}
    assert {f"00000.tar/00000000{i}.jpg" for i in range(4)} <= set(rows)
    assert "loose.jpg" in rows
    kept_late = [n for n in rows if n.startswith("00002.tar")]
    assert 1 <= len(kept_late) < 5
    assert rows["00000.tar/000000000.jpg"]["source_url"] == "https://e.org/x"
    assert [c["text"] for c in rows["00000.tar/000000000.jpg"]["captions"]] == ["a rocket"]
    quarantine = table(tmp_path / "out" / "quarantine", QUARANTINE_SCHEMA)
    damaged = next(r for r in quarantine if r["reason"] == "damaged_tar")
    assert damaged["item"].startswith("00002.tar")
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_input_without_anything_to_use_is_one_clear_error(tmp_path, photos):
    def run(files, name):
        source = tmp_path / name
        source.mkdir()
        for file, content in files.items():
            (source / file).write_bytes(content)
        with pytest.raises(DataError) as caught:
            curate(source, tmp_path / f"{name}_out", CONFIG)
        assert not (tmp_path / f"{name}_out" / "manifest.json").exists()
        return str(caught.value)

    picture = encode(photos["color.png"].resize((90, 90)))
    assert "no images and no .tar files" in run({}, "empty")
    assert "no images and no .tar files" in run({"a.txt": b"lonely"}, "captions_only")
    assert "not one has a caption; put NAME.txt" in run({"a.png": picture, "b.png": picture}, "uncaptioned")
    assert not (tmp_path / "uncaptioned_out").exists()
    message = run({"a.tar": b"garbage" * 200, "b.tar": b""}, "bad_tars")
    assert "2 damaged_tar" in message
    assert "a.tar" in message
    message = run({"a.png": picture[:99], "a.txt": b"x"}, "bad_images")
    assert "1 undecodable" in message
    assert "a.png" in message
    assert (tmp_path / "bad_images_out" / "report.html").is_file()
    tar = tmp_path / "only.tar"
    make_tar(tar, [("a.png", picture)])
    assert "not one usable image has a caption; put NAME.txt" in run(
        {"a.tar": tar.read_bytes()}, "uncaptioned_tar"
    )


def test_webdataset_reads_what_we_write(curated, odd_files):
    webdataset = pytest.importorskip("webdataset")
    _, _, result = curated
    samples = list(webdataset.WebDataset(result["shards"], shardshuffle=False))
    assert len(samples) == result["kept"]
    payloads = {hashlib.sha256(p).hexdigest(): p for p, _ in odd_files.values()}
    for sample in samples:
        (extension,) = set(sample) & set(images.EXTENSIONS.values())
        assert sample[extension] == payloads[sample["__key__"]]
        assert json.loads(sample["json"])["captions"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_pixels": 10**10},
        {"max_shard_bytes": 0},
        {"min_bucket_images": -1},
    ],
)
def test_settings_outside_their_range(options):
    with pytest.raises(ConfigError, match=list(options)[-1]):
        CurationConfig(**options)


def test_many_files_make_many_tasks_and_parts(tmp_path, photos, monkeypatch):
    """Two tasks, rows of both in one shard, duplicates across tasks, in input order."""
    monkeypatch.setattr("megatron_nucleus.data.curation.readers.FILES_PER_TASK", 7)
    source = tmp_path / "in"
    source.mkdir()
    base = photos["coffee.png"].resize((70, 70))
    for i in range(20):
        image = base.copy()
        image.putpixel((0, 0), (i % 15, 0, 0))
        (source / f"{i:02d}.png").write_bytes(encode(image))
        (source / f"{i:02d}.txt").write_text(f"caption {i}")
    result = curate(source, tmp_path / "out", CONFIG)
    assert (result["kept"], result["rejected"]) == (15, {"exact_duplicate": 5})
    rows = table(tmp_path / "out" / "index", INDEX_SCHEMA)
    assert [r["source_id"] for r in rows] == [f"{i:02d}.png" for i in range(15)]
    for i, row in enumerate(rows):
        texts = [f"caption {i}"] + ([f"caption {i + 15}"] if i < 5 else [])
        assert [c["text"] for c in row["captions"]] == texts


def test_the_index_parts_carry_the_schema(curated):
    _, _, result = curated
    (part,) = result["index"]
    assert pq.ParquetFile(part).schema_arrow.names == INDEX_SCHEMA.names


def test_the_default_recipe_on_photographs(tmp_path, photos):
    """Every filter finds what was planted for it, and leaves the photographs alone."""
    pictures = {
        name.rsplit(".", 1)[0]: image.convert("RGB") for name, image in photos.items() if name != "retina.jpg"
    }
    pictures = {name: image for name, image in pictures.items() if min(image.size) >= 256}
    del pictures["color"]  # a chart of colours, smooth by nature
    cat, coffee = pictures["chelsea"], pictures["coffee"]
    noise = np.random.default_rng(0).integers(0, 3, (300, 300, 3), dtype=np.uint8)
    planted = {
        "x_blank.png": (encode(Image.fromarray(noise + 120)), "blank"),
        "x_blurred.png": (encode(coffee.filter(ImageFilter.GaussianBlur(14))), "blurry"),
        "x_pixels.png": (encode(cat, compress_level=1), "pixel_duplicate"),
        "x_again.jpg": (encode(coffee, "JPEG", quality=70), "near_duplicate"),
        "x_blocks.jpg": (encode(pictures["china"], "JPEG", quality=4), "over_compressed"),
    }
    files = {f"{name}.png": encode(image) for name, image in pictures.items()}
    files |= {name: payload for name, (payload, _) in planted.items()}
    source = write_captioned(tmp_path / "in", files)
    default = ["inspect", "exact_duplicates", "blank", "blur", "near_duplicates"]
    scored = {"score": {"as": "image_statistics", "kind": "image_statistics"}}
    tiered = {"tiers": {"tier_by": "shares", "tier_scorer": "image_statistics"}}
    result = curate(source, tmp_path / "out", make_settings([*default, scored, tiered], min_side_px=256))
    reasons = {r["item"]: r["reason"] for r in table(tmp_path / "out" / "quarantine", QUARANTINE_SCHEMA)}
    assert reasons == {name: reason for name, (_, reason) in planted.items()}
    rows = {r["source_id"]: r for r in table(tmp_path / "out" / "index", INDEX_SCHEMA)}
    assert set(rows) == {f"{name}.png" for name in pictures}
    assert result["kept"] == len(rows)
    assert [s["stage"] for s in result["stages"]][1:] == [*default, "image_statistics", "tiers"]
    for row in rows.values():
        (score,) = row["scores"]
        assert score["scorer"] == "image_statistics"
        assert score["revision"]
        assert 0 <= score["value"] <= 1
        assert row["tier"]
        assert row["episode_bucket"]
        assert len(row["phash"]) == 8
        assert row["phash_impl"]
    copies = {name: [(d["source_id"], d["relation"]) for d in rows[name]["duplicates"]] for name in rows}
    assert copies["chelsea.png"] == [("x_pixels.png", "pixel_duplicate")]
    assert copies["coffee.png"] == [("x_again.jpg", "near_duplicate")]
    assert sum(map(len, copies.values())) == 2
    # The better a picture by its score, the higher its tier.
    by_score = sorted(rows.values(), key=lambda row: row["scores"][0]["value"])
    assert [row["tier"] for row in by_score] == sorted(row["tier"] for row in by_score)
    # Training reads it as any other.
    assert len(open_corpus(tmp_path / "out")) == len(rows)


def test_the_same_bytes_are_not_packed_twice(tmp_path):
    """Two samples of one key beside each other would be one sample to a WebDataset reader."""
    photo = encode(Image.effect_noise((300, 300), 60).convert("RGB"))
    write_captioned(tmp_path / "in", {"a.png": photo, "b.png": photo})
    with pytest.raises(ConfigError, match=r"1 images are kept twice, byte for byte .*add exact_duplicates"):
        curate(tmp_path / "in", tmp_path / "out", make_settings(["inspect"]))
    result = curate(tmp_path / "in", tmp_path / "other", make_settings(["inspect", "exact_duplicates"]))
    assert result["kept"] == 1
