"""A curation that is stopped, changed or repeated: nothing is lost, done twice or mixed up."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_nucleus.data.curation import pack, runner, shard_task
from megatron_nucleus.data.curation.pipeline import curate
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.index import INDEX_SCHEMA
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.curation.helpers import encode, files_of, make_settings, table, write_captioned

CONFIG = make_settings(max_shard_bytes=200_000)
TOYS = str(Path(__file__).with_name("toy_stages.py"))


@pytest.mark.parametrize("stop_in", ["inspect", "pack"])
def test_a_stopped_run_goes_on_and_ends_the_same(curated, tmp_path, monkeypatch, stop_in):
    source, output, _ = curated
    module, name = (runner, "run_part") if stop_in == "inspect" else (shard_task, "write_shard")
    original, calls = getattr(module, name), []

    def stopping(task):
        calls.append(task.part if stop_in == "inspect" else task.name)
        if len(calls) == (1 if stop_in == "inspect" else 3):
            raise KeyboardInterrupt
        return original(task)

    monkeypatch.setattr(module, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        curate(source, tmp_path / "out", CONFIG)
    with pytest.raises(DataError, match="unfinished"):
        open_corpus(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("shards/.*"))  # no half-written shard
    calls_before = list(calls)
    result = curate(source, tmp_path / "out", CONFIG)
    assert not set(calls[len(calls_before) :]) & set(calls_before[:-1])  # finished tasks were not run again
    assert files_of(tmp_path / "out") == files_of(output)
    assert not result["already_complete"]


def test_an_unfinished_run_may_be_finished_with_other_settings(curated, tmp_path, monkeypatch):
    source, output, _ = curated
    original = shard_task.write_shard

    def stop(task):
        if task.bucket != "1024x1024":
            raise KeyboardInterrupt
        return original(task)

    monkeypatch.setattr(shard_task, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        curate(source, tmp_path / "out", make_settings(min_side_px=300))
    monkeypatch.setattr(shard_task, "write_shard", original)
    curate(source, tmp_path / "out", CONFIG)
    assert files_of(tmp_path / "out") == files_of(output)


def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path, photos, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_bytes(encode(photos["color.png"].resize((90, 90))))
    (source / "a.txt").write_text("x")
    original = pack.pack_all

    def change(*args, **kwargs):
        (source / "a.png").write_bytes(encode(photos["color.png"].resize((91, 90))))
        return original(*args, **kwargs)

    monkeypatch.setattr(pack, "pack_all", change)
    with pytest.raises(DataError, match=r"a\.png (changed|can no longer be read)"):
        curate(source, tmp_path / "out", CONFIG)


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
    original = pack.pack_all

    def change(*args, **kwargs):
        before = (source / "a.bmp").stat()
        (source / "a.bmp").write_bytes(encode(second, "BMP"))
        assert (source / "a.bmp").stat().st_size == before.st_size
        if keep_time:
            os.utime(source / "a.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
        return original(*args, **kwargs)

    settings = make_settings(workers=workers)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "pack_all", change)
        with pytest.raises(DataError, match=r"a\.bmp changed while it was being curated; run again"):
            curate(source, tmp_path / "out", settings)
    assert curate(source, tmp_path / "out", settings)["kept"] == 2
    curate(source, tmp_path / "fresh", settings)
    out, fresh = files_of(tmp_path / "out"), files_of(tmp_path / "fresh")
    assert out == fresh
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
        patch.setattr(pack, "pack_all", stop)
        with pytest.raises(KeyboardInterrupt):
            curate(source, tmp_path / "out", CONFIG)
    (source / "a.txt").write_text("the picture")
    os.utime(source / "a.txt", ns=(1, 1))
    curate(source, tmp_path / "out", CONFIG)
    rows = table(tmp_path / "out" / "index", INDEX_SCHEMA)
    assert [c["text"] for row in rows for c in row["captions"]] == ["the picture"]


def test_running_again_says_complete_and_other_settings_are_refused(curated, odd_files):
    source, output, result = curated
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    again = curate(source, output, make_settings(max_shard_bytes=200_000, workers=3))
    assert again["already_complete"]
    assert not result["already_complete"]
    assert again["kept"] == result["kept"]
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before
    differs = (
        r"finished data set made differently \(curation.max_shard_bytes: 200000 there, .* --update makes"
    )
    with pytest.raises(ConfigError, match=differs):
        curate(source, output, make_settings(min_side_px=100))
    extra = source / "one_more.png"
    extra.write_bytes(odd_files["grey.png"][0])
    try:
        with pytest.raises(ConfigError, match="input_fingerprint"):
            curate(source, output, CONFIG)
    finally:
        extra.unlink()


def test_after_mending_the_input_the_same_output_folder_works(tmp_path, photos):
    source = tmp_path / "in"
    source.mkdir()
    picture = encode(photos["color.png"].resize((90, 90)))
    (source / "a.png").write_bytes(picture[:99])
    (source / "a.txt").write_text("x")
    with pytest.raises(DataError):
        curate(source, tmp_path / "out", CONFIG)
    (source / "a.png").write_bytes(picture)
    assert curate(source, tmp_path / "out", CONFIG)["kept"] == 1
    assert len(open_corpus(tmp_path / "out")) == 1


def test_output_folders_that_must_not_be_used(tmp_path, curated):
    source, _, _ = curated
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty"):
        curate(source, mine, CONFIG)
    for inside in (source, source / "out", source.parent):
        with pytest.raises(ConfigError, match="beside --input"):
            curate(source, inside, CONFIG)
    with pytest.raises(ConfigError, match="no such folder"):
        curate(tmp_path / "nowhere", tmp_path / "out", CONFIG)


def test_workers_do_not_change_a_byte(curated, tmp_path):
    source, output, result = curated
    parallel = curate(source, tmp_path / "out", make_settings(max_shard_bytes=200_000, workers=2))
    assert files_of(tmp_path / "out") == files_of(output)
    assert len(result["shards"]) > len(result["buckets"])  # several shards in a bucket
    assert {k: parallel[k] for k in ("seen", "kept", "rejected")} == {
        k: result[k] for k in ("seen", "kept", "rejected")
    }


def test_nothing_but_the_data_set_is_left(curated):
    _, output, _ = curated
    names = {p.name for p in output.iterdir()}
    assert names == {
        "manifest.json",
        "shards",
        "index",
        "quarantine",
        "stages",
        "report.html",
        "report_funnel.png",
    }


def test_items_that_failed_for_a_passing_reason_are_tried_again(tmp_path, photos):
    """--retry-failed: those rows alone; the data set is then that of a run in which nothing failed."""
    pictures = {f"{i}.png": encode(photos["coffee.png"].resize((80 + i, 70))) for i in range(6)}
    source = write_captioned(tmp_path / "in", pictures)
    away, calls = tmp_path / "away", tmp_path / "calls"
    away.touch()
    stage = {f"{TOYS}:widths": {"unreachable": str(away), "calls": str(calls)}}
    settings = make_settings(["inspect", stage])
    first = curate(source, tmp_path / "out", settings)
    assert (first["kept"], first["quarantined"], first["retryable"]) == (3, {"no_answer": 3}, 3)
    calls.write_text("")
    assert curate(source, tmp_path / "out", settings)["already_complete"]
    again = curate(source, tmp_path / "out", settings, retry_failed=True)  # still away
    assert (again["kept"], again["retryable"]) == (3, 3)
    assert calls.read_text() == "80 82 84\n"
    away.unlink()
    calls.write_text("")
    last = curate(source, tmp_path / "out", settings, retry_failed=True)
    assert calls.read_text() == "80 82 84\n"
    assert (last["kept"], last["quarantined"], last["retryable"]) == (6, {}, 0)
    curate(source, tmp_path / "clean", settings)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")
    assert curate(source, tmp_path / "out", settings, retry_failed=True)["already_complete"]


def test_a_changed_file_costs_its_own_part(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("megatron_nucleus.data.curation.readers.FILES_PER_TASK", 2)
    pictures = {f"{i}.png": encode(photos["coffee.png"].resize((80 + i, 70))) for i in range(6)}
    source = write_captioned(tmp_path / "in", pictures)
    original, parts = runner.run_part, []

    def noted(task):
        parts.append(task.part)
        return original(task)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_part", noted)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "pack_all", stop)
        with pytest.raises(KeyboardInterrupt):
            curate(source, tmp_path / "out", make_settings())
    assert parts == ["files-000000", "files-000001", "files-000002"]
    (source / "3.txt").write_text("another caption")
    parts.clear()
    curate(source, tmp_path / "out", make_settings())
    assert parts == ["files-000001"]
    rows = {r["source_id"]: r["captions"][0]["text"] for r in table(tmp_path / "out" / "index", INDEX_SCHEMA)}
    assert rows["3.png"] == "another caption"
    assert rows["2.png"] == "a picture called 2"


def test_a_damaged_shard_is_made_again_and_a_missing_one_is_named(tmp_path, photos):
    pictures = {f"{i}.png": encode(photos["coffee.png"].resize((80 + i, 70))) for i in range(3)}
    source = write_captioned(tmp_path / "in", pictures)
    result = curate(source, tmp_path / "out", make_settings())
    shard = Path(result["shards"][0])
    whole = files_of(tmp_path / "out")
    flipped = bytearray(shard.read_bytes())
    flipped[1000] ^= 1
    shard.write_bytes(bytes(flipped))
    (tmp_path / "out" / ".building.json").write_text('{"tool": "curate"}')
    (tmp_path / "out" / "manifest.json").unlink()
    curate(source, tmp_path / "out", make_settings())
    assert files_of(tmp_path / "out") == whole
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name}: missing; copy the data set again or make it again"):
        curate(source, tmp_path / "out", make_settings())


def test_relative_paths_and_a_stage_that_changes_the_folder(tmp_path, photos, monkeypatch):
    pictures = {f"{i}.png": encode(photos["coffee.png"].resize((80 + i, 70))) for i in range(3)}
    write_captioned(tmp_path / "in", pictures)
    monkeypatch.chdir(tmp_path)
    wander = tmp_path / "wander.py"
    wander.write_text(
        "import os\nfrom megatron_nucleus.data.curation.stage import row_stage\n"
        "@row_stage()\ndef wander(rows, config):\n    os.chdir('/')\n    return [{} for _ in rows]\n"
    )
    result = curate("in", "out", make_settings(["inspect", "wander.py:wander"]))
    assert result["kept"] == 3
    assert len(open_corpus(tmp_path / "out")) == 3
