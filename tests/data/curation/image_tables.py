"""Tables that name image files, as the tests of their reader write and list them."""

from __future__ import annotations

import csv
import io
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_nucleus.data.curation import readers


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def listed(root, config=None):
    """item name -> (path or problem, given or None, names of sidecars), in the order of parts."""
    out = {}
    for task in readers.scan(root, config).tasks:
        table = readers.list_part(pickle.loads(pickle.dumps(task)))
        assert table.schema == readers.LISTED_SCHEMA
        for row in table.to_pylist():
            assert row["item"] not in out
            place = row["problem"] or row["container"].decode()
            given = json.loads(row["given"]) if row["given"] else None
            out[row["item"]] = (place, given, [s["name"] for s in row["sidecars"]])
    return out


def write_parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


IMAGES = {"photos/a.jpg": b"A", "photos/b.jpg": b"B", "c.png": b"C"}
ROWS = [
    {"path": "photos/a.jpg", "caption": "a dog", "url": "http://e/1", "license": "MIT", "author": "A", "year": "1999"},
    {"path": "photos/b.jpg", "caption": 'says "no", loudly\nagain', "url": "", "license": "", "author": "", "year": ""},
    {"path": "photos/a.jpg", "caption": "the same dog", "url": "", "license": "", "author": "", "year": "2000"},
]  # fmt: skip


def as_csv(rows, delimiter=",", line_end="\n"):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def make_table(root, kind):
    if kind == "parquet":
        columns = {k: [row[k] or None for row in ROWS] for k in ROWS[0]}
        write_parquet(root / "list.parquet", columns, row_group_size=2)
    elif kind == "jsonl":
        put(root, {"list.jsonl": "".join(json.dumps({k: v for k, v in r.items() if v}) + "\n" for r in ROWS)})
    elif kind == "tsv":
        put(root, {"list.tsv": as_csv(ROWS, "\t")})
    elif kind == "csv with BOM and CR LF":
        put(root, {"list.csv": "\ufeff" + as_csv(ROWS, line_end="\r\n")})
    else:
        put(root, {"list.csv": as_csv(ROWS)})
