"""The Parquet index of a data set: one row per kept image, 50,000 rows per file, versioned schema.

The quarantine beside it lists all that was seen and not kept, with a reason and a reference to the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nucleus.types import Caption
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import open_atomic, sha256_file

SCHEMA_VERSION = 2
ROWS_PER_FILE = 50_000
ROWS_PER_GROUP = 25_000
_ROWS_PER_CHUNK = 5_000
TIERS = ("A1", "A2", "A3", "A4", "A5")  # by quality, the best last (Nucleus-Image's data blog)
EPISODE_BUCKETS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8")  # the order in which images gain weight

CAPTION_TYPE = pa.struct(
    [
        ("text", pa.string()),
        ("length_class", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),
        ("model_revision", pa.string()),
        ("prompt_hash", pa.string()),
        ("alignment", pa.float32()),
    ]
)
SCORE_TYPE = pa.struct([("scorer", pa.string()), ("revision", pa.string()), ("value", pa.float32())])
DUPLICATE_TYPE = pa.struct(  # a copy that is not in the data set, on the row that stands for it
    [
        ("id", pa.string()),
        ("source_id", pa.string()),
        ("source_url", pa.string()),
        ("licence", pa.string()),
        ("relation", pa.string()),  # exact_duplicate | pixel_duplicate | near_duplicate
        ("distance", pa.int16()),  # bits in which the 64-bit hashes differ, where that was measured
    ]
)

INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # hex sha256 of the original bytes
        ("source_id", pa.string()),
        ("source", pa.string()),
        ("source_url", pa.string()),
        ("licence", pa.string()),  # SPDX identifier, or "unknown"
        ("attribution", pa.string()),
        ("tar", pa.string()),  # relative to the data set folder
        ("offset", pa.int64()),  # of the primary member's payload
        ("length", pa.int64()),
        ("width_px", pa.int32()),  # as displayed: after the EXIF orientation
        ("height_px", pa.int32()),
        ("exif_orientation", pa.int8()),  # as found, 1-8
        ("aspect_bucket", pa.string()),
        ("tier", pa.string()),  # one of TIERS, null until scored
        ("episode_bucket", pa.string()),  # one of EPISODE_BUCKETS, null until scored
        ("partition_key", pa.int16()),  # 0-999, from the id
        ("captions", pa.list_(CAPTION_TYPE)),
        ("scores", pa.list_(SCORE_TYPE)),
        ("phash", pa.binary()),  # 8 bytes, the highest bit first
        ("phash_impl", pa.string()),  # a hash of one implementation is not another's
        ("duplicates", pa.list_(DUPLICATE_TYPE)),
        ("duplicate_cluster", pa.string()),  # id shared by a cluster, null for a single image
        ("duplicate_keep", pa.bool_()),
        ("reject_reason", pa.string()),  # null: the image is in use
        ("stage_versions", pa.map_(pa.string(), pa.string())),
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        ("item", pa.string()),  # name inside the input, readable
        ("verdict", pa.string()),  # rejected (policy) | quarantined (unusable)
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("stage", pa.string()),
        (
            "container",
            pa.binary(),
        ),  # path of the file or input tar, relative to the input, as the system spells it
        ("offset", pa.int64()),  # of the payload inside an input tar, null for a plain file
        ("length", pa.int64()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("sha256", pa.string()),
    ]
)


def schema_hash(schema: pa.Schema) -> str:
    """Hex sha256 over the names and types of a schema."""
    return hashlib.sha256("\n".join(f"{f.name}: {f.type}" for f in schema).encode()).hexdigest()


def tagged(schema: pa.Schema) -> pa.Schema:
    """The schema with its version and hash as Parquet file metadata."""
    return schema.with_metadata({"schema_version": str(SCHEMA_VERSION), "schema_hash": schema_hash(schema)})


def caption_dict(caption: Caption) -> dict:
    """A caption as an index or JSON value."""
    return {name: getattr(caption, name) for name in CAPTION_TYPE.names}


def partition_key(sample_id: str) -> int:
    """0-999 from the hex id: a stable way to split a corpus."""
    return int(sample_id[:12], 16) % 1000


class ParquetParts:
    """Writes rows to ``<folder>/part-NNNNN.parquet``, each under a temporary name first, then renamed.

    Equal rows give equal bytes. Memory holds at most one file's rows.
    """

    def __init__(self, folder: str | Path, schema: pa.Schema, rows_per_file: int = ROWS_PER_FILE):
        self.folder, self.schema, self.rows_per_file = Path(folder), tagged(schema), rows_per_file
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: list[dict] = []
        self._rows: list[dict] = []
        self._tables: list[pa.Table] = []
        self._waiting = 0

    def add(self, row: dict) -> None:
        """Append one row; a key outside the schema is a bug and raises KeyError."""
        if unknown := row.keys() - set(self.schema.names):
            raise KeyError(f"not in the schema: {sorted(unknown)}")
        self._rows.append(row)
        if len(self._rows) >= _ROWS_PER_CHUNK:
            self._settle()

    def add_table(self, table: pa.Table) -> None:
        """Append rows as a table of the schema."""
        self._settle()
        self._append(table)

    def close(self) -> list[dict]:
        """Write the rest; returns ``{"path", "rows", "bytes", "sha256"}`` per file, path from the parent."""
        self._settle()
        if self._waiting:
            self._write(self._waiting)
        return self.files

    def _settle(self) -> None:
        if self._rows:
            rows, self._rows = self._rows, []
            self._append(pa.Table.from_pylist(rows, schema=self.schema))

    def _append(self, table: pa.Table) -> None:
        self._tables.append(table.cast(self.schema))
        self._waiting += len(table)
        while self._waiting >= self.rows_per_file:
            self._write(self.rows_per_file)

    def _write(self, rows: int) -> None:
        path = self.folder / f"part-{len(self.files):05d}.parquet"
        table = pa.concat_tables(self._tables).combine_chunks()
        write_table(table.slice(0, rows), path)
        self._tables, self._waiting = [table.slice(rows)], self._waiting - rows
        self.files.append(
            {
                "path": f"{self.folder.name}/{path.name}",
                "rows": rows,
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
        )


def write_table(table: pa.Table, path: Path) -> None:
    """Write one Parquet file atomically (zstd, row groups of 25,000)."""
    with open_atomic(path) as file:
        pq.write_table(
            table, file, compression="zstd", row_group_size=ROWS_PER_GROUP, write_page_checksum=True
        )


def open_parquet(path: str | Path, schema: pa.Schema) -> pq.ParquetFile:
    """Open one part and check that it is ours and whole.

    Raises:
        DataError: missing, damaged, or written with another schema version.
    """
    path = Path(path)
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; copy the data set again or make it again") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged ({reason}); copy the data set again or make it again") from error
    metadata = file.schema_arrow.metadata or {}
    version = metadata.get(b"schema_version", b"none").decode("ascii", "replace")
    found = metadata.get(b"schema_hash", b"").decode("ascii", "replace")
    if version != str(SCHEMA_VERSION) or found != schema_hash(schema):
        raise DataError(
            f"{path}: schema version {version} ({found[:12] or 'no hash'}), this program reads version "
            f"{SCHEMA_VERSION} ({schema_hash(schema)[:12]}); make the data set again with this version"
        )
    return file


def iter_rows(path: str | Path, schema: pa.Schema, batch_rows: int = 4096) -> Iterator[dict]:
    """Rows of one part as dictionaries, in order, a few thousand in memory at a time.

    Map columns come back as dictionaries.
    """
    maps = [f.name for f in schema if pa.types.is_map(f.type)]
    for batch in iter_batches(path, schema, batch_rows):
        for row in batch.to_pylist():
            for name in maps:
                row[name] = dict(row[name]) if row[name] is not None else None
            yield row


def iter_batches(
    path: str | Path, schema: pa.Schema, batch_rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows of one part in order, ``batch_rows`` in memory at a time. columns: by default all.

    Raises:
        DataError: as `open_parquet`, or a damaged page.
    """
    file = open_parquet(path, schema)
    try:
        yield from file.iter_batches(batch_size=batch_rows, columns=list(columns) if columns else None)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged ({reason}); copy the data set again or make it again") from error
    finally:
        file.close()
