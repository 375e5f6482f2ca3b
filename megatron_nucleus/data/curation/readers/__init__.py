"""Input -> tasks -> items: a folder of images with caption files beside them, tables that name image files, and
WebDataset tars, in any mix.

Scanning looks at names, sizes and times of change, and at which files tables name, and cuts the input into tasks,
always the same for the same input. Listing a task gives its items. Items carry references, not bytes: the original
bytes are kept as they are. Nothing from an input tar is ever written under a name that the tar chose, and no row of a
table leads out of the input folder.

- A folder: an image, and ``.txt`` and ``.json`` files of the same name beside it (`folder`). img2dataset's ``files``
  output is such a folder.
- A ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file with a column of image files (`tables`): one item per row, also
  of rows that name the same file. A file that a table names is not listed a second time as a file of the folder.
- A ``.tar``: members of one key are one sample (`tars`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from megatron_nucleus.data.curation.readers import folder, items, places, rows, tables, tars
from megatron_nucleus.data.curation.readers.items import (
    READ_REASONS,
    Item,
    Reference,
    extension,
    read_reference,
    readable,
)
from megatron_nucleus.data.curation.readers.tables import ReadersConfig, TableSpan
from megatron_nucleus.utils.config import to_dict
from megatron_nucleus.utils.errors import ConfigError

__all__ = [
    "FILES_PER_TASK",
    "LISTED_SCHEMA",
    "READ_REASONS",
    "ROWS_PER_TASK",
    "Item",
    "ReadersConfig",
    "Reference",
    "Scan",
    "TableSpan",
    "Task",
    "describe",
    "extension",
    "list_part",
    "read_reference",
    "readable",
    "scan",
    "task_items",
]

FILES_PER_TASK = 512
ROWS_PER_TASK = 1024  # own choice: few enough for small tables to keep several workers busy
_SPAN = [("container", pa.binary()), ("offset", pa.int64()), ("length", pa.int64())]
LISTED_SCHEMA = pa.schema(
    [
        ("item", pa.string()),  # `Item.name`
        *_SPAN,  # `Item.reference`; offset and length are null for a whole file
        ("sidecars", pa.list_(pa.struct([("name", pa.string()), *_SPAN]))),
        ("problem", pa.struct([("reason", pa.string()), ("detail", pa.string())])),  # null: none
        ("given", pa.string()),  # JSON object, null: none
    ]
)


class Task(NamedTuple):
    """A piece of the input, a part: some files of the folder, one tar, or some rows of a table; picklable.

    stamp: over names, sizes, times of change, settings and this code, so that any edit of the part's files changes it,
    and copying too; of a table's rows over the whole input, since they may name any file.
    """

    name: str
    root: str
    tar: bytes | None
    items: tuple[Item, ...]
    table: TableSpan | None = None
    stamp: str = ""


class Scan(NamedTuple):
    """The input at a glance.

    fingerprint: over all names and sizes, the same for a copy of the input; an edit that keeps the size does not
    change it. files: items of the folder. tables: how many, with ``rows`` in all. ignored: files that are neither
    images nor captions nor tables. warnings: one sentence each.
    """

    tasks: list[Task]
    fingerprint: str
    files: int
    tars: int
    ignored: int
    captions_without_image: int
    tables: int = 0
    rows: int = 0
    warnings: tuple[str, ...] = ()


class _Contents(NamedTuple):
    """What the tables of the input are. spans: those that can be read. damaged: (path, why)."""

    spans: list[TableSpan]
    damaged: list[tuple[bytes, str]]
    records: set[bytes]
    named: set[bytes]
    warnings: tuple[str, ...]
    tables: int


def scan(root: str | Path, config: ReadersConfig | None = None) -> Scan:
    """List the input folder (recursively, in name order, following links) and cut it into tasks.

    Tasks are named ``files-NNNNNN``, ``tar-NNNNNN`` and ``table-NNNNNN``. Memory grows with the number of files (their
    names), not with the rows of tables.

    Raises:
        ConfigError: no such folder; a table with captions and URLs but without a column of image files; or columns
            named in ``config`` that no table has.
    """
    config = config or ReadersConfig()
    base = _check_root(root)
    digest = hashlib.sha256()
    states: dict[bytes, tuple[int, int]] = {}  # size and time of change
    paths, hidden = [], 0
    for path, size, changed_ns in folder.walk(base):
        digest.update(path + b"\0" + str(size).encode() + b"\n")
        states[path] = size, changed_ns
        if folder.is_hidden(path):
            hidden += 1
        else:
            paths.append(path)
    archives = [p for p in paths if extension(p) == "tar"]
    stems = {os.path.splitext(p)[0] for p in archives}
    found = _look_at_tables(os.fsdecode(base), paths, stems, config)
    stems |= {os.path.splitext(p)[0] for p in found.records}
    plain = [p for p in paths if extension(p) not in ("tar", *tables.KINDS) and not _is_statistics(p, stems)]
    listed, orphans, used = folder.pair(plain, found.named)
    named = sum(p in found.named and extension(p) not in items.SIDECAR_EXTENSIONS for p in plain)
    ignored = hidden + len(paths) - len(archives) - found.tables - len(listed) - named - orphans - used
    stamper = _Stamper(states, _how_it_is_read(config))
    tasks = [
        task._replace(stamp=stamper.stamp(task))
        for task in _tasks(os.fsdecode(base), listed, archives, found)
    ]
    return Scan(
        tasks,
        digest.hexdigest(),
        len(listed),
        len(archives),
        ignored,
        orphans,
        found.tables,
        sum(span.rows for span in found.spans),
        found.warnings,
    )


class _Stamper:
    """Stamps of tasks. states: path -> size and time of change, of all files. start: what every stamp depends on."""

    def __init__(self, states: dict[bytes, tuple[int, int]], start: bytes):
        self._states, self._start = states, start
        whole = hashlib.sha256(start)
        for path, state in states.items():
            whole.update(path + repr(state).encode())
        self._whole = whole.hexdigest()

    def stamp(self, task: Task) -> str:
        """See `Task`."""
        if task.table is not None:
            return self._whole
        if task.tar is not None:
            used = [task.tar]
        else:
            used = [r.path for item in task.items for r in (item.reference, *(r for _, r in item.sidecars))]
        digest = hashlib.sha256(self._start)
        for path in used:
            digest.update(path + repr(self._states.get(path)).encode())
        return digest.hexdigest()


def _check_root(root: str | Path) -> bytes:
    base = os.fsencode(root)
    if not os.path.isdir(base):
        kind = "is not a folder" if os.path.exists(base) else "no such folder"
        raise ConfigError(
            f"--input {root}: {kind}; give a folder of images with captions, of tables that name image files, or of "
            "WebDataset tars"
        )
    if not os.access(base, os.R_OK | os.X_OK):
        raise ConfigError(f"--input {root}: cannot be listed; check its permissions")
    return base


def _how_it_is_read(config: ReadersConfig) -> bytes:
    modules = (folder, items, places, rows, tables, tars)
    sources = [inspect.getsource(module) for module in modules] + [Path(__file__).read_text("utf-8")]
    return "\0".join([json.dumps(to_dict(config)), *sources]).encode()


def _is_statistics(path: bytes, stems: set[bytes]) -> bool:
    """``00000_stats.json``, which img2dataset writes beside ``00000.tar`` or the folder ``00000``."""
    stem, suffix = os.path.splitext(path)
    return suffix == b".json" and stem.endswith(b"_stats") and stem[: -len(b"_stats")] in stems


def _look_at_tables(root: str, paths: list[bytes], stems: set[bytes], config: ReadersConfig) -> _Contents:
    """stems: of tars; ``00000.parquet`` beside ``00000.tar`` is img2dataset's record of it, whatever it holds."""
    files = tables.NamedFiles(root, set(paths))
    folders = {os.path.dirname(path) for path in paths}
    spans: list[TableSpan] = []
    damaged: list[tuple[bytes, str]] = []
    records: set[bytes] = set()
    warnings, passed_over = [], []
    count = 0
    for path in (p for p in paths if extension(p) in tables.KINDS):
        stem = os.path.splitext(path)[0]
        if extension(path) == "parquet" and stem in stems:
            found = tables.Found(is_record=True)
        else:
            found = tables.find_table(root, path, config, ROWS_PER_TASK, files, stem in folders)
        if found.is_record:
            records.add(path)
            passed_over.append(f"{readable(path)}: img2dataset's record of a download")
        elif found.ignored is not None:
            warnings.append(f"{readable(path)}: no table of images, ignored ({found.ignored})")
            passed_over.append(f"{readable(path)}: {found.ignored}")
        else:
            count += 1
            spans += found.spans
            if found.damage is not None:
                damaged.append((path, found.damage))
    if not count:
        tables.check_named(config, passed_over)
    return _Contents(spans, damaged, records, files.named, tuple(warnings), count)


def _tasks(root: str, listed: list[Item], archives: list[bytes], found: _Contents) -> list[Task]:
    tasks = [
        Task(f"files-{n:06d}", root, None, tuple(listed[i : i + FILES_PER_TASK]))
        for n, i in enumerate(range(0, len(listed), FILES_PER_TASK))
    ]
    tasks += [Task(f"tar-{n:06d}", root, path, ()) for n, path in enumerate(archives)]
    entries: list[tuple[bytes, int, TableSpan | Item]] = [
        (span.path, span.first, span) for span in found.spans
    ]
    for path, damage in found.damaged:
        item = Item(readable(path), Reference(path), (), ("damaged_table", damage))
        entries.append((path, 0, item))
    for n, (_, _, entry) in enumerate(sorted(entries, key=lambda entry: entry[:2])):
        is_item = isinstance(entry, Item)
        tasks.append(
            Task(f"table-{n:06d}", root, None, (entry,) if is_item else (), None if is_item else entry)
        )
    return tasks


def task_items(task: Task) -> list[Item]:
    """The items of a task; a tar is listed here, by its headers, and a table's rows are read here."""
    if task.table is not None:
        return tables.table_items(task.root, task.table)
    return list(task.items) if task.tar is None else tars.tar_items(task.root, task.tar)


def list_part(task: Task) -> pa.Table:
    """The items of a task as a table (`LISTED_SCHEMA`)."""
    return pa.Table.from_pylist(list(_listed(task)), schema=LISTED_SCHEMA)


def _listed(task: Task) -> Iterator[dict]:
    for item in task_items(task):
        problem = None
        if item.problem is not None:
            reason, detail = item.problem
            problem = {"reason": reason, "detail": detail.encode("utf-8", "backslashreplace").decode()}
        yield {
            "item": item.name,
            **_span(item.reference),
            "sidecars": [{"name": name, **_span(reference)} for name, reference in item.sidecars],
            "problem": problem,
            "given": item.given,
        }


def _span(reference: Reference) -> dict:
    return {"container": reference.path, "offset": reference.offset, "length": reference.length}


def describe(task: Task) -> str:
    """Where a task's items come from, in words: its file, or its first and last."""
    if task.table is not None:
        last = task.table.first + task.table.rows - 1
        return f"{readable(task.table.path)} rows {task.table.first} to {last}"
    if task.tar is not None:
        return readable(task.tar)
    first, last = task.items[0].name, task.items[-1].name
    return first if first == last else f"{first} to {last}"
