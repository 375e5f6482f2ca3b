"""Data set folders: complete only with a manifest, damage named, other people's folders left alone."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from megatron_nucleus.data.dataset import open_corpus, pack_empty_text, pack_features, unpack_features
from megatron_nucleus.data.manifest import DatasetWriter, begin_update, claim_output, withdraw
from megatron_nucleus.data.shards import encode_json
from megatron_nucleus.types import Caption
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.data.corpora import make_tiered

BUCKETS = ("1344x768", "1024x1024", "832x1248")


def make(folder, count=30, **options):
    writer = DatasetWriter(folder, tool="test", settings={"n": count}, max_shard_bytes=8000, **options)
    for i in range(count):
        captions = [{"text": f"caption {i}", "length_class": "short", "source": "test"}]
        members = {"png": bytes([i]) * (i * 37), "json": encode_json({"captions": captions})}
        writer.add({"id": f"{i:064x}", "aspect_bucket": BUCKETS[i % 3]}, members)
    return writer.finish({"seen": count, "kept": count})


def test_rows_are_grouped_by_bucket_and_read_back(tmp_path):
    manifest = make(tmp_path / "d")
    corpus = open_corpus(tmp_path / "d")
    assert len(corpus) == 30
    assert corpus.buckets == {"1024x1024": 10, "1344x768": 10, "832x1248": 10}
    assert corpus.encoded is None
    seen = []
    for bucket, start in corpus.start.items():
        for row in range(start, start + corpus.buckets[bucket]):
            sample = corpus.read(row)
            i = int(sample.id, 16)
            assert sample.bucket == corpus.bucket(row) == bucket == BUCKETS[i % 3]
            assert sample.payload == bytes([i]) * (i * 37)
            assert sample.captions == (Caption(f"caption {i}", "short", "test"),)
            seen.append(i)
    assert sorted(seen) == list(range(30))
    assert manifest["buckets"]["1344x768"]["samples"] == 10
    assert sum(s["samples"] for s in manifest["shards"]) == 30


def test_the_manifest_is_a_function_of_the_content(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    make(tmp_path / "c", count=29)
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    hashes = [open_corpus(tmp_path / n).manifest_hash for n in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_finished_folder_is_recognised_and_a_foreign_one_refused(tmp_path):
    make(tmp_path / "d")
    assert DatasetWriter(tmp_path / "d", tool="test", settings={"n": 30}).complete
    assert claim_output(tmp_path / "d", "test", {"n": 30}) == "complete"
    with pytest.raises(ConfigError, match="n: 30 there, 31 here"):
        claim_output(tmp_path / "d", "test", {"n": 31})
    with pytest.raises(ConfigError, match="n: 30 there, 31 here.*; --update makes again what this changes"):
        claim_output(tmp_path / "d", "test", {"n": 31}, update=False)
    assert claim_output(tmp_path / "d", "test", {"n": 30}, update=True) == "complete"
    assert claim_output(tmp_path / "d", "test", {"n": 31}, update=True) == "outdated"
    assert claim_output(tmp_path / "d", "test", {"n": 30}) == "complete"  # nothing was changed by asking
    begin_update(tmp_path / "d", "test", {"n": 31})
    assert len(open_corpus(tmp_path / "d")) == 30
    assert claim_output(tmp_path / "d", "test", {"n": 30}, update=True) == "outdated"
    withdraw(tmp_path / "d")
    with pytest.raises(DataError, match="unfinished"):
        open_corpus(tmp_path / "d")
    assert claim_output(tmp_path / "d", "test", {"n": 31}, update=True) == "resume"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        claim_output(tmp_path / "mine", "test", {})
    with pytest.raises(ConfigError, match="is a file"):
        claim_output(tmp_path / "mine" / "thesis.tex", "test", {})
    assert claim_output(tmp_path / "new", "test", {"a": 1}) == "new"
    assert claim_output(tmp_path / "new", "test", {"a": 2}) == "resume"
    with pytest.raises(ConfigError, match="unfinished work of test"):
        claim_output(tmp_path / "new", "other", {"a": 2})


def test_an_unfinished_folder_never_opens(tmp_path):
    writer = DatasetWriter(tmp_path / "d", tool="test", settings={})
    writer.add({"id": "0" * 64, "aspect_bucket": "1024x1024"}, {"png": b"x"})
    with pytest.raises(DataError, match="unfinished"):
        open_corpus(tmp_path / "d")
    writer.abort()
    again = DatasetWriter(tmp_path / "d", tool="test", settings={})
    again.add({"id": "1" * 64, "aspect_bucket": "1024x1024"}, {"png": b"y"})
    again.finish({})
    corpus = open_corpus(tmp_path / "d")
    assert [corpus.id(r) for r in range(len(corpus))] == ["1" * 64]


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        open_corpus(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no manifest\.json"):
        open_corpus(tmp_path / "empty")
    make(tmp_path / "good")
    manifest = json.loads((tmp_path / "good/manifest.json").read_text())
    shard, part = manifest["shards"][0]["tar"], manifest["index"][0]["path"]

    def broken(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad")
        with pytest.raises(DataError) as caught:
            open_corpus(tmp_path / "bad")
        return str(caught.value)

    def rewrite(path, **changes):
        path.write_text(json.dumps({**manifest, **changes}))

    def same_size_garbage(path):
        path.write_bytes(bytes(len(path.read_bytes())))

    assert f"{shard}: missing" in broken(lambda d: (d / shard).unlink())
    assert f"{shard}: 512 bytes" in broken(lambda d: (d / shard).write_bytes(bytes(512)))
    assert f"{part}: missing" in broken(lambda d: (d / part).unlink())
    assert f"{part}: 3 bytes" in broken(lambda d: (d / part).write_bytes(b"abc"))
    assert f"{part}: damaged" in broken(lambda d: same_size_garbage(d / part))
    assert "manifest.json: damaged" in broken(lambda d: (d / "manifest.json").write_text("{"))
    assert "manifest.json: damaged" in broken(lambda d: (d / "manifest.json").write_text("[]"))
    assert "version 7" in broken(lambda d: rewrite(d / "manifest.json", format_version=7))
    assert "samples" in broken(lambda d: rewrite(d / "manifest.json", samples=31))
    assert "damaged (KeyError" in broken(lambda d: rewrite(d / "manifest.json", shards=[{}]))


def test_encoded_samples_keep_their_tensors(tmp_path):
    latents, texts = torch.randn(4, 6, 5), [torch.randn(3, 8), torch.randn(1, 8).bfloat16()]
    payload = pack_features(latents, texts)
    for i, text in enumerate(texts):
        got_latents, got_text = unpack_features(payload, i)
        assert torch.equal(got_latents, latents)
        assert torch.equal(got_text, text)
        assert got_text.dtype == text.dtype
    assert unpack_features(payload, None)[1] is None
    for damaged, caption in ((payload[:50], 0), (b"", 0), (payload, 2)):
        with pytest.raises(DataError, match="damaged encoded sample"):
            unpack_features(damaged, caption)
    encoded = {"codec": {}, "text_encoder": {}, "resolution_px": 32}
    writer = DatasetWriter(tmp_path / "d", tool="encode", settings={}, encoded=encoded)
    writer.add_file("empty_text.safetensors", pack_empty_text(torch.ones(2, 8)))
    writer.add({"id": "0" * 64, "aspect_bucket": "1024x1024"}, {"safetensors": payload})
    writer.finish({})
    corpus = open_corpus(tmp_path / "d")
    assert corpus.encoded == encoded
    assert torch.equal(corpus.empty_text(), torch.ones(2, 8))
    (tmp_path / "d/empty_text.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"empty_text\.safetensors: missing or damaged"):
        corpus.empty_text()


CELLS = {
    "1344x768": {("A2", "B1"): 5, ("A1", "B8"): 4, (None, None): 3, ("A1", "B1"): 6, ("A5", None): 2},
    "1024x1024": {("A3", "B3"): 30},
}


def test_rows_lie_cell_by_cell_in_the_order_of_the_index(tmp_path):
    folder = make_tiered(tmp_path / "d", CELLS)
    corpus = open_corpus(folder)
    rows = {r["id"]: (i, r) for i, r in enumerate(pq.read_table(folder / "index").to_pylist())}
    assert corpus.buckets == {"1024x1024": 30, "1344x768": 20}
    order = [(None, None), ("A1", "B1"), ("A1", "B8"), ("A2", "B1"), ("A5", None)]
    assert list(corpus.cells["1344x768"]) == order
    for bucket, cells in corpus.cells.items():
        assert {c: len(r) for c, r in cells.items()} == CELLS[bucket]
        end = corpus.start[bucket]
        for (tier, episode), members in cells.items():
            assert members.start == end
            end = members.stop
            positions = [rows[corpus.id(row)][0] for row in members]
            assert positions == sorted(positions)
            for row in members:
                stored = rows[corpus.id(row)][1]
                assert corpus.bucket(row) == stored["aspect_bucket"] == bucket
                assert corpus.tier(row) == stored["tier"] == tier
                assert corpus.episode(row) == stored["episode_bucket"] == episode
        assert end == corpus.start[bucket] + corpus.buckets[bucket]


def test_data_without_tiers_is_one_cell_per_bucket(tmp_path):
    make(tmp_path / "d")
    corpus = open_corpus(tmp_path / "d")
    assert {b: list(cells.items()) for b, cells in corpus.cells.items()} == {
        b: [((None, None), range(10 * i, 10 * i + 10))] for i, b in enumerate(corpus.buckets)
    }


def test_an_unknown_tier_in_the_index_is_damage(tmp_path):
    with pytest.raises(DataError, match=r"part-00000.parquet: column tier holds 'A7', which is none of A1"):
        open_corpus(make_tiered(tmp_path / "d", {"1024x1024": {("A7", "B1"): 2}}))


def test_the_smallest_ids_are_held_out_whatever_the_order(tmp_path):
    folder = make_tiered(tmp_path / "d", CELLS)
    whole, corpus = open_corpus(folder), open_corpus(folder, held_out_samples=12)
    ids = sorted(whole.id(row) for row in range(len(whole)))
    assert corpus.held_out == range(38, 50)
    assert len(corpus) == sum(corpus.buckets.values()) == 38
    held = [corpus.id(row) for row in corpus.held_out]
    assert sorted(held) == ids[:12]
    assert sorted(corpus.id(row) for row in range(len(corpus))) == ids[12:]
    ranges = list(corpus.held_out_buckets.values())
    assert [row for rows in ranges for row in rows] == list(corpus.held_out)
    where = {whole.id(row): (whole.bucket(row), whole.tier(row), whole.episode(row)) for row in range(50)}
    for bucket, rows in corpus.held_out_buckets.items():
        inside = [corpus.id(row) for row in rows]
        assert inside == sorted(inside)  # by bucket, then id
        for row in rows:
            assert (corpus.bucket(row), corpus.tier(row), corpus.episode(row)) == where[corpus.id(row)]
            assert corpus.bucket(row) == bucket
            assert corpus.read(row).id == corpus.id(row)
    for row in range(len(corpus)):
        assert (corpus.bucket(row), corpus.tier(row), corpus.episode(row)) == where[corpus.id(row)]
    more = open_corpus(folder, held_out_samples=20)
    assert set(held) < {more.id(row) for row in more.held_out}  # the choice only grows


def test_nothing_is_held_out_unless_asked_and_too_much_is_refused(tmp_path):
    folder = make_tiered(tmp_path / "d", CELLS)
    assert open_corpus(folder).held_out == range(50, 50)
    assert open_corpus(folder).held_out_buckets == {}
    for count in (26, -1):
        with pytest.raises(ConfigError, match=f"--valid-samples {count}: 0 to 25, half of the 50 images"):
            open_corpus(folder, held_out_samples=count)
    make(tmp_path / "small", count=9)  # three buckets; ids 0, 1, 2, ... go round them
    assert open_corpus(tmp_path / "small", held_out_samples=4).buckets == dict(
        zip(sorted(BUCKETS), (2, 1, 2), strict=True)
    )
    make(tmp_path / "tiny", count=4)  # of bucket 1024x1024 there is image 1 alone
    with pytest.raises(
        ConfigError, match="--valid-samples 2: would leave no image of aspect bucket 1024x1024"
    ):
        open_corpus(tmp_path / "tiny", held_out_samples=2)
