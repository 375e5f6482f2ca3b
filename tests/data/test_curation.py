"""Curation from end to end on real photographs in every odd form: each is used or listed, and nothing crashes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from megatron_nucleus.data import images
from megatron_nucleus.data.curation import filters, pack, pipeline
from megatron_nucleus.data.curation.filters import CurationConfig
from megatron_nucleus.data.curation.pipeline import EngineConfig, curate
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.index import INDEX_SCHEMA, QUARANTINE_SCHEMA, iter_rows
from megatron_nucleus.data.loader import DataConfig, build_loader
from megatron_nucleus.utils.errors import ConfigError, DataError

CONFIG = CurationConfig(min_side_px=64, min_bucket_images=1, max_shard_bytes=400_000)
ALONE = EngineConfig(workers=1)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def odd_files(photos):
    """name -> (bytes, expected verdict: ``kept`` or a reason)."""
    cat = photos["chelsea.png"].convert("RGB")  # 451 x 300
    grey = photos["camera.png"].resize((200, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encode(photos["astronaut.png"].convert("RGB"), "JPEG")
    wide = cat.resize((640, 70))
    frames = {"save_all": True, "append_images": [ImageOps.mirror(cat)]}
    return {
        "plain.jpg": (jpeg, "kept"),
        "odd_size.png": (encode(cat.resize((333, 187))), "kept"),
        "portrait.png": (encode(cat.rotate(90, expand=True)), "kept"),
        "cmyk.jpg": (encode(cat.convert("CMYK"), "JPEG"), "kept"),
        "palette.png": (encode(cat.quantize(32)), "kept"),
        "grey.png": (encode(grey), "kept"),
        "sixteen_bit.png": (encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)), "kept"),
        "alpha.png": (encode(cat.convert("RGBA")), "kept"),
        "one_bit.tif": (encode(cat.convert("1"), "TIFF"), "kept"),
        "rotated.jpg": (encode(cat, "JPEG", exif=exif), "kept"),
        "modern.webp": (encode(cat, "WEBP"), "kept"),
        "still.gif": (encode(cat, "GIF"), "kept"),
        "really_a_jpeg.png": (encode(cat, "JPEG", quality=50), "kept"),
        "no_extension": (encode(cat, "JPEG", quality=40), "kept"),
        "animated.gif": (encode(cat, "GIF", **frames), "animated"),
        "animated.webp": (encode(cat, "WEBP", **frames), "animated"),
        "pages.tif": (encode(cat, "TIFF", **frames), "multipage"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "undecodable"),
        "truncated.png": (encode(cat)[:5000], "undecodable"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        "zero.jpg": (b"", "empty_file"),
        "floating.tif": (encode(Image.fromarray(np.zeros((99, 99), np.float32)), "TIFF"), "unsupported_mode"),
        "bomb.png": (encode(Image.new("1", (12_000, 12_000))), "decompression_bomb"),
        "tiny.png": (encode(cat.resize((63, 200))), "too_small"),
        "huge.png": (encode(Image.new("1", (8_200, 4_000))), "too_large"),
        "panorama.png": (encode(wide), "extreme_aspect"),
        "copy_of_plain.jpg": (jpeg, "exact_duplicate"),
        "uncaptioned.png": (encode(cat.resize((100, 101))), "missing_caption"),
        "broken_json.png": (encode(cat.resize((101, 101))), "bad_caption"),
    }  # fmt: skip


def write_folder(folder, odd_files):
    folder.mkdir()
    for name, (payload, _) in odd_files.items():
        (folder / name).write_bytes(payload)
        stem = name.rsplit(".", 1)[0] if "." in name else name
        if name == "broken_json.png":
            (folder / f"{stem}.json").write_text("{")
        elif name == "animated.webp":
            continue  # shares animated.txt
        elif name != "uncaptioned.png":
            (folder / f"{stem}.txt").write_text(f"a picture called {stem}")
    return folder


@pytest.fixture(scope="module")
def curated(tmp_path_factory, odd_files):
    root = tmp_path_factory.mktemp("curated")
    source = write_folder(root / "in", odd_files)
    return source, root / "out", curate(source, root / "out", CONFIG, ALONE)


def table(folder, schema):
    return [row for path in sorted(folder.glob("*.parquet")) for row in iter_rows(path, schema)]


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_item_is_kept_or_listed_with_its_reason(curated, odd_files):
    _, output, result = curated
    verdicts = {row["source_id"]: "kept" for row in table(output / "index", INDEX_SCHEMA)}
    for row in table(output / "quarantine", QUARANTINE_SCHEMA):
        assert row["item"] not in verdicts
        verdicts[row["item"]] = row["reason"]
        assert row["verdict"] == ("rejected" if row["reason"] in filters.REJECTED else "quarantined")
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
    assert set(result["rejected"]) == {"too_small", "too_large", "extreme_aspect", "exact_duplicate"}
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
        assert set(row["stage_versions"]) == {"inspect", "pack"}
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
    assert sample.info["duplicates"] == [{"source_id": "plain.jpg", "source_url": None, "licence": "unknown"}]
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
    result = curate(source, tmp_path / "out", CONFIG, ALONE)
    rows = {r["source_id"]: r for r in table(tmp_path / "out" / "index", INDEX_SCHEMA)}
    assert set(rows) == {"a2.png", "b2.png"}
    assert [c["text"] for c in rows["a2.png"]["captions"]] == ["four", "one", "two", "three"]
    assert [c["text"] for c in rows["b2.png"]["captions"]] == ["five", "six"]
    assert (rows["a2.png"]["licence"], rows["a2.png"]["source_url"]) == ("CC0-1.0", "u2")
    assert result["rejected"] == {"exact_duplicate": 2}


def test_workers_do_not_change_a_byte(curated, tmp_path):
    source, output, result = curated
    parallel = curate(source, tmp_path / "out", CONFIG, EngineConfig(workers=2))
    assert files_of(tmp_path / "out") == files_of(output)
    assert len(result["shards"]) > len(result["buckets"])  # several shards in a bucket
    assert {k: parallel[k] for k in ("seen", "kept", "rejected")} == {
        k: result[k] for k in ("seen", "kept", "rejected")
    }


def test_nothing_but_the_data_set_is_left(curated):
    _, output, _ = curated
    names = {p.name for p in output.iterdir()}
    assert names == {"manifest.json", "shards", "index", "quarantine", "report.html"}


def test_running_again_says_complete_and_other_settings_are_refused(curated, odd_files):
    source, output, result = curated
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    again = curate(source, output, CONFIG, EngineConfig(workers=3))
    assert again["already_complete"]
    assert not result["already_complete"]
    assert again["kept"] == result["kept"]
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before
    with pytest.raises(ConfigError, match="finished data set made differently"):
        curate(source, output, CurationConfig(min_side_px=100), ALONE)
    extra = source / "one_more.png"
    extra.write_bytes(odd_files["grey.png"][0])
    try:
        with pytest.raises(ConfigError, match="input_fingerprint"):
            curate(source, output, CONFIG, ALONE)
    finally:
        extra.unlink()


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


@pytest.mark.parametrize("stop_in", ["inspect", "pack"])
def test_a_stopped_run_goes_on_and_ends_the_same(curated, tmp_path, monkeypatch, stop_in):
    source, output, _ = curated
    module, name = (filters, "inspect_task") if stop_in == "inspect" else (pack, "pack_task")
    original, calls = getattr(module, name), []

    def stopping(task, config, folder, skip, started):
        calls.append(task.name)
        if len(calls) == (1 if stop_in == "inspect" else 3):
            raise KeyboardInterrupt
        return original(task, config, folder, skip, started)

    monkeypatch.setattr(module, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        curate(source, tmp_path / "out", CONFIG, ALONE)
    with pytest.raises(DataError, match="unfinished"):
        open_corpus(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("shards/.*"))  # no half-written shard
    calls_before = list(calls)
    result = curate(source, tmp_path / "out", CONFIG, ALONE)
    assert not set(calls[len(calls_before) :]) & set(calls_before[:-1])  # finished tasks were not run again
    assert files_of(tmp_path / "out") == files_of(output)
    assert not result["already_complete"]


def test_an_unfinished_run_may_be_finished_with_other_settings(curated, tmp_path, monkeypatch):
    source, output, _ = curated
    original = pack.pack_task

    def stop(task, *rest):
        if task.bucket != "1024x1024":
            raise KeyboardInterrupt
        return original(task, *rest)

    monkeypatch.setattr(pack, "pack_task", stop)
    with pytest.raises(KeyboardInterrupt):
        curate(source, tmp_path / "out", CurationConfig(min_side_px=300, min_bucket_images=1), ALONE)
    monkeypatch.setattr(pack, "pack_task", original)
    curate(source, tmp_path / "out", CONFIG, ALONE)
    assert files_of(tmp_path / "out") == files_of(output)


def test_small_buckets_are_merged_and_reported(curated, tmp_path):
    source, _, first = curated
    config = CurationConfig(min_side_px=64, min_bucket_images=1000)
    result = curate(source, tmp_path / "out", config, ALONE)
    assert len(result["buckets"]) == 1
    assert sum(result["buckets"].values()) == first["kept"]
    assert set(result["merged_buckets"]) | set(result["buckets"]) == set(first["buckets"])
    assert open_corpus(tmp_path / "out").buckets == result["buckets"]


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


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
    result = curate(source, tmp_path / "out", CONFIG, ALONE)
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
            curate(source, tmp_path / f"{name}_out", CONFIG, ALONE)
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
    assert "not one has a caption; put KEY.txt" in run({"a.tar": tar.read_bytes()}, "uncaptioned_tar")


def test_after_mending_the_input_the_same_output_folder_works(tmp_path, photos):
    source = tmp_path / "in"
    source.mkdir()
    picture = encode(photos["color.png"].resize((90, 90)))
    (source / "a.png").write_bytes(picture[:99])
    (source / "a.txt").write_text("x")
    with pytest.raises(DataError):
        curate(source, tmp_path / "out", CONFIG, ALONE)
    (source / "a.png").write_bytes(picture)
    assert curate(source, tmp_path / "out", CONFIG, ALONE)["kept"] == 1
    assert len(open_corpus(tmp_path / "out")) == 1


def test_output_folders_that_must_not_be_used(tmp_path, curated):
    source, _, _ = curated
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty"):
        curate(source, mine, CONFIG, ALONE)
    for inside in (source, source / "out", source.parent):
        with pytest.raises(ConfigError, match="beside --input"):
            curate(source, inside, CONFIG, ALONE)
    with pytest.raises(ConfigError, match="no such folder"):
        curate(tmp_path / "nowhere", tmp_path / "out", CONFIG, ALONE)


def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path, photos, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(encode(photos["color.png"].resize((90, 90))))
    (source / "a.txt").write_text("x")
    original = pipeline._pack

    def change(*args):
        (source / "a.png").write_bytes(encode(photos["color.png"].resize((91, 90))))
        return original(*args)

    monkeypatch.setattr(pipeline, "_pack", change)
    with pytest.raises(DataError, match=r"a\.png (changed|can no longer be read)"):
        curate(source, tmp_path / "out", CONFIG, ALONE)


@pytest.mark.parametrize("keep_time", [False, True], ids=["new mtime", "same mtime"])
@pytest.mark.parametrize("workers", [1, 2])
def test_after_an_input_of_the_same_size_changed_running_again_works(
    tmp_path, photos, monkeypatch, keep_time, workers
):
    source = tmp_path / "in"
    source.mkdir()
    first, second = (Image.fromarray(np.full((90, 90, 3), value, np.uint8)) for value in (10, 20))
    (source / "a.bmp").write_bytes(encode(first, "BMP"))
    (source / "b.png").write_bytes(encode(photos["color.png"].resize((90, 70))))
    for name in "ab":
        (source / f"{name}.txt").write_text(f"picture {name}")
    original = pipeline._pack

    def change(*args):
        before = (source / "a.bmp").stat()
        (source / "a.bmp").write_bytes(encode(second, "BMP"))
        assert (source / "a.bmp").stat().st_size == before.st_size
        if keep_time:
            os.utime(source / "a.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
        return original(*args)

    engine = EngineConfig(workers=workers)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_pack", change)
        with pytest.raises(DataError, match=r"a\.bmp changed while it was being curated; run again"):
            curate(source, tmp_path / "out", CONFIG, engine)
    assert curate(source, tmp_path / "out", CONFIG, engine)["kept"] == 2
    curate(source, tmp_path / "fresh", CONFIG, engine)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")
    row = next(r for r in table(tmp_path / "out" / "index", INDEX_SCHEMA) if r["source_id"] == "a.bmp")
    assert row["id"] == hashlib.sha256(encode(second, "BMP")).hexdigest()


def test_a_caption_corrected_between_two_attempts_is_read_again(tmp_path, photos, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(encode(photos["color.png"].resize((90, 90))))
    (source / "a.txt").write_text("teh picture")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_pack", stop)
        with pytest.raises(KeyboardInterrupt):
            curate(source, tmp_path / "out", CONFIG, ALONE)
    (source / "a.txt").write_text("the picture")
    os.utime(source / "a.txt", ns=(1, 1))
    curate(source, tmp_path / "out", CONFIG, ALONE)
    rows = table(tmp_path / "out" / "index", INDEX_SCHEMA)
    assert [c["text"] for row in rows for c in row["captions"]] == ["the picture"]


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


def test_the_report_stands_alone_and_escapes_what_it_shows(curated, tmp_path, photos):
    _, output, result = curated
    page = (output / "report.html").read_text()
    for word in (
        "undecodable",
        "decompression_bomb",
        "exact_duplicate",
        f"<b>{result['seen']}</b> items seen",
    ):
        assert word in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/jpeg;base64,") >= result["kept"]
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(encode(photos["color.png"].resize((90, 90))))
    (source / "a.txt").write_text("<script>alert(1)</script>")
    curate(source, tmp_path / "out", CONFIG, ALONE)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    "options",
    [
        {"min_side_px": 0},
        {"min_side_px": 500, "max_side_px": 400},
        {"max_aspect": 0.5},
        {"max_aspect": float("nan")},
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
    result = curate(source, tmp_path / "out", CONFIG, ALONE)
    assert (result["kept"], result["rejected"]) == (15, {"exact_duplicate": 5})
    rows = table(tmp_path / "out" / "index", INDEX_SCHEMA)
    assert [r["source_id"] for r in rows] == [f"{i:02d}.png" for i in range(15)]
    for i, row in enumerate(rows):
        texts = [f"caption {i}"] + ([f"caption {i + 15}"] if i < 5 else [])
        assert [c["text"] for c in row["captions"]] == texts
    shutil.rmtree(tmp_path / "out")


def test_the_index_parts_carry_the_schema(curated):
    _, _, result = curated
    (part,) = result["index"]
    assert pq.ParquetFile(part).schema_arrow.names == INDEX_SCHEMA.names
