"""Shards: any tar or WebDataset reader sees the same bytes; the index offsets are exact; damage is named."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest

from megatron_nucleus.data.shards import (
    ShardFile,
    ShardReader,
    ShardWriter,
    encode_json,
    padded,
    sample_bytes,
)
from megatron_nucleus.utils.errors import DataError


def samples(count=20):
    rng = np.random.default_rng(0)
    sizes = [0, 1, 511, 512, 513, 1024, *rng.integers(2, 5000, count)]
    return [
        (f"{i:04x}" * 16, {"jpg": rng.bytes(n), "json": encode_json({"captions": ["x" * int(n)], "i": i})})
        for i, n in enumerate(sizes)
    ]


def test_tar_and_webdataset_read_the_same_bytes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    writer = ShardWriter(tmp_path, "1024x1024", max_bytes=20_000)
    for key, members in samples():
        writer.add(key, members)
    infos = writer.close()
    assert len(infos) > 2
    expected = dict(samples())
    read = {}
    for info in infos:
        with tarfile.open(tmp_path / info.tar) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                read.setdefault(key, {})[extension] = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    assert read == expected
    pipeline = webdataset.WebDataset([str(tmp_path / i.tar) for i in infos], shardshuffle=False)
    assert {s["__key__"]: {"jpg": s["jpg"], "json": s["json"]} for s in pipeline} == expected


def test_locations_are_the_payload_and_reads_return_it(tmp_path):
    writer = ShardWriter(tmp_path, "1344x768", max_bytes=20_000)
    places = [(key, members, writer.add(key, members)) for key, members in samples()]
    writer.close()
    reader = ShardReader(tmp_path, max_open_files=2)
    for key, members, place in places:
        with open(tmp_path / place.tar, "rb") as file:
            for extension, (offset, length) in place.members.items():
                file.seek(offset)
                assert file.read(length) == members[extension]
        assert (place.offset, place.length) == place.members["jpg"]
        assert reader.read(place.tar, place.offset, place.length, key) == members["jpg"]
        payload, info = reader.read_sample(place.tar, place.offset, place.length, key)
        assert payload == members["jpg"]
        assert encode_json(info) == members["json"]
    reader.close()


def test_a_shard_holds_max_bytes_and_never_splits_a_sample(tmp_path):
    writer = ShardWriter(tmp_path, "1024x1024", max_bytes=10_000)
    for key, members in samples():
        writer.add(key, members)
    infos = writer.close()
    assert [i.tar for i in infos] == [f"shards/1024x1024-{n:05d}.tar" for n in range(len(infos))]
    for info in infos:
        assert info.bytes == os.path.getsize(tmp_path / info.tar)
        assert info.bytes <= 10_000 or info.samples == 1
    total = sum(sample_bytes([len(p) for p in members.values()]) for _, members in samples())
    assert sum(i.bytes for i in infos) == total + 1024 * len(infos)
    assert [padded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_equal_samples_give_equal_bytes(tmp_path):
    digests = []
    for name in ("a", "b"):
        writer = ShardWriter(tmp_path / name, "1024x1024")
        for key, members in samples():
            writer.add(key, members)
        (info,) = writer.close()
        digests.append(info.sha256)
    assert digests[0] == digests[1]
    first, second = ((tmp_path / n / info.tar).read_bytes() for n in "ab")
    assert first == second


def test_nothing_appears_under_the_final_name_before_close(tmp_path):
    shard = ShardFile(tmp_path, "shards/x-00000.tar", "x")
    shard.add("k", {"png": b"abc"})
    assert not (tmp_path / "shards/x-00000.tar").exists()
    shard.abort()
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "extension"), [("a.b", "jpg"), ("../up", "jpg"), ("ü", "jpg"), ("a", "tar.gz"), ("", "jpg")]
)
def test_names_that_readers_would_split_are_refused(tmp_path, key, extension):
    writer = ShardWriter(tmp_path, "1024x1024")
    with pytest.raises(DataError, match="not"):
        writer.add(key, {extension: b"x"})
    writer.abort()


def test_damage_is_named(tmp_path):
    writer = ShardWriter(tmp_path, "1024x1024")
    places = [(key, writer.add(key, members)) for key, members in samples()]
    writer.close()
    path = tmp_path / "shards/1024x1024-00000.tar"
    reader = ShardReader(tmp_path)
    key, place = places[5]
    with pytest.raises(DataError, match=r"1024x1024-00000\.tar.*do not belong together"):
        reader.read(place.tar, place.offset + 512, place.length, key)
    with pytest.raises(DataError, match=r"1024x1024-00000\.tar"):
        reader.read(place.tar, place.offset, place.length, "other")
    with pytest.raises(DataError, match=r"gone-00000\.tar.*cannot be read"):
        reader.read("shards/gone-00000.tar", place.offset, place.length, key)
    path.write_bytes(path.read_bytes()[: place.offset + place.length - 1])
    with pytest.raises(DataError, match=r"1024x1024-00000\.tar"):
        ShardReader(tmp_path).read(place.tar, place.offset, place.length, key)
    damaged = io.BytesIO(encode_json({"captions": []})[:-1])
    shard = ShardFile(tmp_path, "shards/y-00000.tar", "y")
    bad = shard.add("k", {"png": b"abc", "json": damaged.getvalue()})
    shard.close()
    with pytest.raises(DataError, match=r"y-00000\.tar: k\.json is damaged"):
        reader.read_sample(bad.tar, bad.offset, bad.length, "k")
