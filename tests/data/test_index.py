"""The Parquet index: schema in the metadata, fixed part size, equal bytes, damage and foreign versions named."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_nucleus.data import index
from megatron_nucleus.types import Caption
from megatron_nucleus.utils.errors import DataError


def row(i: int) -> dict:
    captions = [index.caption_dict(Caption(f"caption {i}", "short", "test", alignment=0.5))]
    return {"id": f"{i:064x}", "offset": i, "captions": captions, "stage_versions": {"inspect": "v1"}}


def test_rows_come_back_in_order_in_parts_of_fixed_size(tmp_path):
    parts = index.ParquetParts(tmp_path / "index", index.INDEX_SCHEMA, rows_per_file=7)
    for i in range(10):
        parts.add(row(i))
    parts.add_table(pa.Table.from_pylist([row(i) for i in range(10, 24)], schema=index.INDEX_SCHEMA))
    files = parts.close()
    assert [f["rows"] for f in files] == [7, 7, 7, 3]
    assert [f["path"] for f in files] == [f"index/part-{n:05d}.parquet" for n in range(4)]
    back = [r for f in files for r in index.iter_rows(tmp_path / f["path"], index.INDEX_SCHEMA)]
    assert [r["offset"] for r in back] == list(range(24))
    assert back[3]["captions"][0]["text"] == "caption 3"
    assert back[3]["captions"][0]["alignment"] == 0.5
    assert back[23]["stage_versions"] == {"inspect": "v1"}
    metadata = pq.ParquetFile(tmp_path / files[0]["path"]).schema_arrow.metadata
    assert metadata[b"schema_version"] == str(index.SCHEMA_VERSION).encode()
    assert metadata[b"schema_hash"] == index.schema_hash(index.INDEX_SCHEMA).encode()


def test_the_schema_has_the_documented_columns():
    names = [
        "id",
        "source_id",
        "source",
        "source_url",
        "licence",
        "attribution",
        "tar",
        "offset",
        "length",
        "width_px",
        "height_px",
        "exif_orientation",
        "aspect_bucket",
        "tier",
        "episode_bucket",
        "partition_key",
        "captions",
        "scores",
        "phash",
        "phash_impl",
        "duplicates",
        "duplicate_cluster",
        "duplicate_keep",
        "reject_reason",
        "stage_versions",
    ]
    assert names == index.INDEX_SCHEMA.names
    caption = ["text", "length_class", "source", "model", "model_revision", "prompt_hash", "alignment"]
    assert caption == index.CAPTION_TYPE.names


def test_the_default_part_holds_fifty_thousand_rows(tmp_path):
    parts = index.ParquetParts(tmp_path / "index", index.INDEX_SCHEMA)
    table = pa.Table.from_pylist([{"offset": i} for i in range(60_000)], schema=index.INDEX_SCHEMA)
    parts.add_table(table)
    assert [f["rows"] for f in parts.close()] == [50_000, 10_000]
    file = pq.ParquetFile(tmp_path / "index/part-00000.parquet")
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [25_000, 25_000]


def test_equal_rows_give_equal_bytes_however_they_arrive(tmp_path):
    rows = [row(i) for i in range(20)]
    one = index.ParquetParts(tmp_path / "one", index.INDEX_SCHEMA, 9)
    for r in rows:
        one.add(r)
    two = index.ParquetParts(tmp_path / "two", index.INDEX_SCHEMA, 9)
    for low in range(0, 20, 4):
        two.add_table(pa.Table.from_pylist(rows[low : low + 4], schema=index.INDEX_SCHEMA))
    assert [f["sha256"] for f in one.close()] == [f["sha256"] for f in two.close()]


def test_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(KeyError, match="widht"):
        index.ParquetParts(tmp_path, index.INDEX_SCHEMA).add({"widht": 3})


def test_damage_and_foreign_schemas_are_named(tmp_path):
    parts = index.ParquetParts(tmp_path / "index", index.INDEX_SCHEMA)
    for i in range(500):
        parts.add(row(i))
    path = tmp_path / parts.close()[0]["path"]
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"nowhere\.parquet: missing"):
        index.open_parquet(tmp_path / "nowhere.parquet", index.INDEX_SCHEMA)
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1 nonsense PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"part-00000\.parquet: damaged"):
            index.open_parquet(path, index.INDEX_SCHEMA)
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF  # inside the first column's page
    path.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match=r"part-00000\.parquet: damaged"):
        list(index.iter_rows(path, index.INDEX_SCHEMA))
    other = index.INDEX_SCHEMA.append(pa.field("new", pa.int8()))
    index.write_table(pa.Table.from_pylist([row(0)], schema=index.tagged(other)), path)
    with pytest.raises(DataError, match="schema version"):
        index.open_parquet(path, index.INDEX_SCHEMA)
    foreign = index.INDEX_SCHEMA.with_metadata({"schema_version": "99", "schema_hash": "0"})
    index.write_table(pa.Table.from_pylist([row(0)], schema=foreign), path)
    with pytest.raises(DataError, match="schema version 99"):
        index.open_parquet(path, index.INDEX_SCHEMA)


def test_partition_key_is_uniform_over_a_thousand():
    keys = [index.partition_key(f"{i * 0x9E3779B97F4A7C15 % 2**64:064x}"[::-1]) for i in range(5000)]
    assert min(keys) >= 0
    assert max(keys) <= 999
    assert len(set(keys)) > 950
