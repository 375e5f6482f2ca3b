"""Everything that is wrong with a folder at once: nothing is lost, and all four places give the same counts."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
import zlib
from collections import Counter

import pytest

from megatron_nucleus.data import index, manifest
from megatron_nucleus.data.curation.pipeline import curate
from tests.data.curation.helpers import encode, files_of, make_settings, make_tar, table


def png_header(width, height):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, photos):
    """The folder, and item -> ``kept`` or the reason that it must end with."""
    folder = tmp_path_factory.mktemp("hostile") / "in"
    folder.mkdir()
    cat = photos["chelsea.png"].convert("RGB")
    sizes = iter(range(150, 300))
    expected = {}

    def picture():
        side = next(sizes)
        return encode(cat.crop((20, 20, 20 + side, 20 + side)), "JPEG")

    def put(name, payload, reason, caption=b"a cat", side=".txt"):
        (folder / name).write_bytes(payload)
        (folder / (name.rsplit(".", 1)[0] + side)).write_bytes(caption)
        expected[name] = reason

    put("whole.jpg", picture(), "kept")
    put("line\nbreak.jpg", picture(), "kept")
    put("bom.jpg", picture(), "kept", b"\xef\xbb\xbfa cat")
    put("bomb.png", png_header(60_000, 60_000), "decompression_bomb")
    put("bomb_of_all.png", png_header(2**31 - 1, 2**31 - 1), "decompression_bomb")
    put("cut.jpg", picture()[:-500], "undecodable")
    put("control.jpg", picture(), "bad_caption", b"a\0cat")
    put("long.jpg", picture(), "bad_caption", b"word " * 20_000)
    put("latin.jpg", picture(), "bad_caption", "café".encode("latin-1"))
    put("sixteen.jpg", picture(), "bad_caption", "a cat".encode("utf-16"))
    put("deep.jpg", picture(), "bad_caption", b'{"caption":"x","v":' + b"[" * 99_999, ".json")
    put("half.jpg", picture(), "bad_caption", b'{"caption":"\\ud800"}', ".json")
    put("number.jpg", picture(), "bad_caption", b'{"caption":5}', ".json")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "folder.jpg").mkdir()
    (folder / "again").symlink_to(".")
    expected |= {"pipe.jpg": "not_a_file", "dangling.jpg": "unreadable", "device.jpg": "not_a_file"}
    members = [("a.txt", b"a cat"), ("/etc/b.jpg", picture()), ("../c.jpg", picture()), ("a.jpg", picture())]
    make_tar(folder / "t.tar", [*members, ("a.jpg", picture()), ("d.jpg", b""), ("d.txt", b"a cat")])
    with tarfile.open(folder / "links.tar", "w") as tar:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    expected |= {
        "t.tar//etc/b.jpg": "unsafe_member",
        "t.tar/../c.jpg": "unsafe_member",
        "t.tar/a.jpg": "kept",
    }
    expected |= {"t.tar/d.jpg": "empty_file", "links.tar/l.jpg": "not_a_file"}
    with tarfile.open(folder / "t.tar") as tar:
        second = tar.getmembers()[4]
    expected[f"t.tar/a.jpg (at byte {second.offset_data})"] = "duplicate_member"
    (folder / "t.csv").write_bytes(b'path,caption\n/etc/passwd,x\n../up.jpg,y\nno.jpg,z\n"open,w\n\xff,v\n')
    expected |= {"t.csv#1//etc/passwd": "unsafe_path", "t.csv#2/../up.jpg": "unsafe_path"}
    expected |= {"t.csv#3/no.jpg": "missing_file", "t.csv#4": "bad_row", "t.csv#5": "bad_row"}
    return folder, expected


@pytest.fixture(scope="module")
def result(hostile, tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile_out") / "one"
    return out, curate(hostile[0], out, make_settings())


def test_every_item_ends_where_it_must(hostile, result):
    out, _ = result
    found = {row["source_id"]: "kept" for row in table(out / "index", index.INDEX_SCHEMA)}
    found |= {row["item"]: row["reason"] for row in table(out / "quarantine", index.QUARANTINE_SCHEMA)}
    assert found == hostile[1]


def test_result_manifest_quarantine_and_shards_count_alike(hostile, result):
    out, counts = result
    made, _ = manifest.read_manifest(out)
    dropped = table(out / "quarantine", index.QUARANTINE_SCHEMA)
    assert counts["seen"] == len(hostile[1]) == counts["kept"] + len(dropped)
    for verdict in ("rejected", "quarantined"):
        rows = Counter(row["reason"] for row in dropped if row["verdict"] == verdict)
        assert made["counts"][verdict] == counts[verdict] == dict(sorted(rows.items()))
    inside = {}
    for shard in made["shards"]:
        with tarfile.open(out / shard["tar"]) as tar:
            inside |= {m.name: tar.extractfile(m).read() for m in tar}
    pictures = {name: payload for name, payload in inside.items() if not name.endswith(".json")}
    assert len(pictures) == counts["kept"] == made["samples"]
    assert all(
        hashlib.sha256(payload).hexdigest() == name.split(".")[0] for name, payload in pictures.items()
    )
    for name, payload in pictures.items():
        source_id = json.loads(inside[name.split(".")[0] + ".json"])["source_id"]
        if "/" not in source_id:
            assert (hostile[0] / source_id).read_bytes() == payload


def test_a_pool_makes_the_same_bytes(hostile, result, tmp_path):
    curate(hostile[0], tmp_path / "out", make_settings(workers=2))
    assert files_of(tmp_path / "out") == files_of(result[0])
