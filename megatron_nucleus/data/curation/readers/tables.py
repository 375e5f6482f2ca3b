"""Tables whose rows name image files that are already there: CSV, TSV, JSONL and Parquet.

A table is a file with a column of paths, each relative to the table's folder or else to the input. Columns are known
by name, in any case (`PATH_COLUMNS`, `CAPTION_COLUMNS`, `captions.PROVENANCE_KEYS`; the first that is there counts), or
named in the settings. The other columns are metadata, except binary ones, which are left where they are. An empty cell
says nothing. A cell of a text table's column ``captions`` may be a JSON list.

A file with both captions and URLs but no paths is an error: the images were not downloaded, or their column has another
name. A file with neither is ignored, with a warning; columns named in the settings while no table is left are an error
(`check_named`). img2dataset's ``00000.parquet`` beside its tar or folder of the same name is a record of the download,
no table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from megatron_nucleus.data.curation.captions import PROVENANCE_KEYS
from megatron_nucleus.data.curation.readers.items import Item, Reference, extension, readable
from megatron_nucleus.data.curation.readers.places import NamedFiles, Places
from megatron_nucleus.data.curation.readers.rows import (
    Row,
    is_binary,
    is_text,
    parquet_rows,
    parquet_schema,
    text_rows,
)
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

KINDS = {"csv": "csv", "tsv": "csv", "jsonl": "jsonl", "parquet": "parquet"}  # by extension
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "local_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "alt")
_ALIASES = {"path": PATH_COLUMNS, "caption": CAPTION_COLUMNS, **PROVENANCE_KEYS}
_KNOBS = {  # of `ReadersConfig`, by role
    "path": "table_path_column",
    "caption": "table_caption_column",
    "source_url": "table_url_column",
    "licence": "table_licence_column",
    "attribution": "table_attribution_column",
}
_SIDECAR_SUFFIXES = (b".json", b".JSON", b".txt", b".TXT")  # of files beside one that a row names
_RECORD_COLUMNS = {"key", "status"}  # of the table that img2dataset writes beside its output


@dataclasses.dataclass(frozen=True)
class ReadersConfig:
    """How tables of image files are read; by default columns are known by their usual names."""

    table_path_column: str | None = knob(None, f"column of image files; by default {', '.join(PATH_COLUMNS)}")
    table_caption_column: str | None = knob(
        None, f"column of captions; by default {', '.join(CAPTION_COLUMNS)}"
    )
    table_url_column: str | None = knob(
        None, f"column of source URLs; by default {', '.join(PROVENANCE_KEYS['source_url'])}"
    )
    table_licence_column: str | None = knob(
        None, f"column of licences; by default {', '.join(PROVENANCE_KEYS['licence'])}"
    )
    table_attribution_column: str | None = knob(
        None, f"column of authors; by default {', '.join(PROVENANCE_KEYS['attribution'])}"
    )
    table_separator: str | None = knob(
        None, "between the fields of .csv and .tsv files; by default comma and tab"
    )

    def __post_init__(self) -> None:
        if self.table_separator is not None and (
            len(self.table_separator) != 1 or self.table_separator in '"\r\n'
        ):
            raise ConfigError(
                f"table_separator {self.table_separator!r}: one character, no quote and no line break"
            )

    def named(self) -> dict[str, str]:
        """Role -> column, of those that are set."""
        given = {role: getattr(self, name) for role, name in _KNOBS.items()}
        return {role: column for role, column in given.items() if column is not None}


class TableSpan(NamedTuple):
    """Some rows of a table, to be listed as a part; picklable.

    path: of the table, relative to the input. kind: csv, jsonl or parquet. separator: between CSV fields.
    first: number of the first row, from 1. rows: how many. offset: byte at which they begin; Parquet is read by row
    number instead. columns: those that are read, in order; of JSONL every row has its own.
    """

    path: bytes
    kind: str
    separator: str
    config: ReadersConfig
    first: int = 1
    rows: int = 0
    offset: int = 0
    columns: tuple[str, ...] = ()

    def read(self, file: BinaryIO) -> Iterator[Row]:
        """Its rows, with a dictionary as value.

        Raises:
            pa.ArrowException, OSError: a Parquet file is damaged.
        """
        if self.kind == "parquet":
            yield from parquet_rows(file, self.columns, self.first - 1, self.rows)
            return
        for row in itertools.islice(text_rows(file, self.kind, self.offset, self.separator), self.rows):
            yield self.row_with_names(row)

    def row_with_names(self, row: Row) -> Row:
        """A text table's row with its fields as a dictionary."""
        if row.value is None or self.kind != "csv":
            return row
        if len(row.value) != len(self.columns):
            return Row(
                row.offset,
                row.length,
                None,
                f"{len(row.value)} fields, the header has {len(self.columns)}",
            )
        return row._replace(value=dict(zip(self.columns, row.value, strict=True)))


class Found(NamedTuple):
    """What a file with a table's extension turned out to be.

    spans: its rows. damage: why it cannot be read. ignored: why it is no table. is_record: of img2dataset.
    """

    spans: tuple[TableSpan, ...] = ()
    damage: str | None = None
    ignored: str | None = None
    is_record: bool = False


def roles_of(columns: Iterable[str], config: ReadersConfig) -> dict[str, str]:
    """Which column holds what: ``path``, ``caption``, ``source_url``, ``licence``, ``attribution`` -> its name."""
    columns = list(columns)
    lower = {name.lower(): name for name in reversed(columns)}
    named = config.named()
    found = {}
    for role, aliases in _ALIASES.items():
        if role in named:
            if named[role] in columns:
                found[role] = named[role]
        elif alias := next((a for a in aliases if a in lower), None):
            found[role] = lower[alias]
    return found


def _check_roles(label: str, columns: list[str], config: ReadersConfig) -> dict[str, str] | None:
    """Roles of a table's columns, None when it is no table of images.

    Raises:
        ConfigError: a column is missing, or there twice.
    """
    roles, named = roles_of(columns, config), config.named()
    listed = ", ".join(columns)[:300]
    if "path" not in roles:
        if {"caption", "source_url"} <= roles.keys():
            raise ConfigError(
                f"{label}: missing column {named.get('path', 'path')}; has {listed}; download the images, or name "
                "the column of their files with --table-path-column"
            )
        return None
    for role, column in named.items():
        if role not in roles:
            raise ConfigError(f"{label}: missing column {column}, set for {role}; has {listed}")
    if len(set(columns)) != len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise ConfigError(f"{label}: two columns named {twice!r}; rename one")
    return roles


def check_named(config: ReadersConfig, passed_over: Sequence[str]) -> None:
    """Refuse columns named in the settings when the input has no table of images: a misspelt name would leave out
    every table. Where there are such tables, `find_table` says which of the columns one of them lacks.

    Args:
        passed_over: for every file of a table's kind that is no table of images, its name, why, and its columns.

    Raises:
        ConfigError: naming the setting and the columns there are.
    """
    for role, column in config.named().items():
        flag = "--" + _KNOBS[role].replace("_", "-")
        there = "; ".join(passed_over)[:1000] or f"there is no file of the kinds {', '.join(KINDS)}"
        raise ConfigError(
            f"{flag} {column}: no table of images in the input has that column; {there}; name a column of a table, or "
            "leave the setting out"
        )


def find_table(
    root: str, path: bytes, config: ReadersConfig, rows_per_span: int, files: NamedFiles, beside_folder: bool
) -> Found:
    """Look at a file with a table's extension: is it a table, and where do its rows lie?

    Reads all of a text table, and of a Parquet table the column of paths, streamed, and notes in ``files`` what they
    name. beside_folder: whether a folder of the same name without extension lies beside it.

    Raises:
        ConfigError: see the module docstring.
    """
    suffix = extension(path)
    separator = config.table_separator or ("\t" if suffix == "tsv" else ",")
    span = TableSpan(path, KINDS[suffix], separator, config)
    try:
        with open(os.path.join(os.fsencode(root), path), "rb") as file:
            if span.kind == "parquet":
                return _find_parquet(file, span, rows_per_span, files, beside_folder)
            return _find_text(file, span, rows_per_span, files)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last for the name of a column
        return Found(damage=_one_line(error))


def _find_parquet(
    file: BinaryIO, span: TableSpan, rows_per_span: int, files: NamedFiles, beside_folder: bool
) -> Found:
    schema, count = parquet_schema(file)
    if beside_folder and set(schema.names) >= _RECORD_COLUMNS:
        return Found(is_record=True)
    label = readable(span.path)
    roles = _check_roles(label, schema.names, span.config)
    if roles is None:
        return Found(ignored=f"no column of image files; has {', '.join(schema.names)[:300]}")
    paths = roles["path"]
    if not is_text(schema.field(paths).type):
        raise ConfigError(
            f"{label}: column {paths} holds {schema.field(paths).type}, not paths; name the column of image files with "
            "--table-path-column"
        )
    spans = []
    columns = tuple(field.name for field in schema if not is_binary(field.type))
    for first in range(0, count, rows_per_span):
        rows = min(rows_per_span, count - first)
        spans.append(span._replace(first=first + 1, rows=rows, columns=columns))
    # Damage ends the search for names here; the part that it is in says so when it is listed.
    with contextlib.suppress(OSError, pa.ArrowException):
        for row in parquet_rows(file, [paths], 0, count):
            files.add(span.path, row.value and row.value[paths])
    return Found(tuple(spans))


def _find_text(file: BinaryIO, span: TableSpan, rows_per_span: int, files: NamedFiles) -> Found:
    rows = text_rows(file, span.kind, 0, span.separator)
    if span.kind == "csv":
        head = next(rows, None)
    else:  # the first line that can be read shows the columns, and is a row
        head = next((row for row in rows if row.value is not None), None)
        rows = text_rows(file, span.kind)
    if head is None or head.value is None:
        empty = os.fstat(file.fileno()).st_size == 0
        return (
            Found(ignored="empty") if empty else Found(damage=head.damage if head else "no line can be read")
        )
    names = [name.strip() for name in head.value] if span.kind == "csv" else list(head.value)
    roles = _check_roles(readable(span.path), names, span.config)
    if roles is None:
        return Found(ignored=f"no column of image files; has {', '.join(names)[:300]}")
    span = span._replace(columns=tuple(names) if span.kind == "csv" else ())
    starts: list[tuple[int, int]] = []  # number and offset of the first row of each part
    count = 0
    for row in rows:
        if count % rows_per_span == 0:
            starts.append((count, row.offset))
        count += 1
        files.add(span.path, _path_cell(row, span, names, roles))
    return Found(
        tuple(
            span._replace(first=first + 1, rows=min(rows_per_span, count - first), offset=offset)
            for first, offset in starts
        )
    )


def _path_cell(row: Row, span: TableSpan, names: list[str], roles: dict[str, str]) -> object:
    """What a row of a text table names as its file."""
    if row.value is None:
        return None
    if span.kind == "jsonl":
        return row.value.get(roles_of(row.value, span.config).get("path"))
    return row.value[names.index(roles["path"])] if len(row.value) == len(names) else None


def table_items(root: str, span: TableSpan) -> list[Item]:
    """Items of some rows of a table. A part that cannot be read ends with an item of reason damaged_table."""
    label = readable(span.path)
    reader = _RowReader(root, span)
    items: list[Item] = []
    try:
        with open(os.path.join(os.fsencode(root), span.path), "rb") as file:
            for row in span.read(file):
                items.append(reader.item(f"{label}#{span.first + len(items)}", row))
        if len(items) != span.rows:
            raise ValueError(f"{len(items)} of {span.rows} rows; the file has changed")
    except (OSError, pa.ArrowException, ValueError) as error:
        name = f"{label}#{span.first + len(items)} (rest, to row {span.first + span.rows - 1})"
        items.append(Item(name, Reference(span.path), (), ("damaged_table", _one_line(error))))
    return items


class _RowReader:
    """Makes items of the rows of one table."""

    def __init__(self, root: str, span: TableSpan):
        self._root, self._span, self._places = os.fsencode(root), span, Places(root)
        self._roles = None if span.kind == "jsonl" else roles_of(span.columns, span.config)

    def item(self, name: str, row: Row) -> Item:
        """The item of a row; ``name`` says which one it is."""
        here = Reference(self._span.path, row.offset, row.length)
        if row.value is None:
            return Item(name, here, (), ("bad_row", row.damage))
        values: dict[str, Any] = row.value
        roles = roles_of(values, self._span.config) if self._roles is None else self._roles
        cell = values.get(roles.get("path", ""))
        if not isinstance(cell, str) or not cell.strip():
            return Item(name, here, (), ("bad_row", "no path"))
        name = f"{name}/{cell.encode('utf-8', 'backslashreplace').decode()}"
        try:
            candidates = self._places.candidates(self._span.path, cell)
        except ValueError as error:  # also text that no file name can hold
            return Item(name, here, (), ("bad_row", f"no name of a file: {error}"))
        if not candidates:
            return Item(name, here, (), ("unsafe_path", "leads out of the input folder"))
        found = next((path for path in candidates if self._exists(path)), None)
        try:
            given = json.dumps(_given(values, roles, self._span))
        except RecursionError:
            return Item(name, here, (), ("bad_row", "nested too deep"))
        if found is None:
            url = "; a URL: download the images first" if "://" in cell else ""
            return Item(name, Reference(candidates[0]), (), ("missing_file", f"no such file{url}"), given)
        stem = os.path.splitext(found)[0]
        beside = [stem + suffix for suffix in _SIDECAR_SUFFIXES if self._exists(stem + suffix)]
        sidecars = tuple((readable(path), Reference(path)) for path in beside if path != found)
        return Item(name, Reference(found), sidecars, None, given)

    def _exists(self, path: bytes) -> bool:
        try:
            os.stat(os.path.join(self._root, path))
        except OSError as error:
            return error.errno == errno.EACCES  # there, and reading it says what is wrong
        return True


def _given(values: Mapping[str, Any], roles: Mapping[str, str], span: TableSpan) -> dict[str, Any]:
    """A row as the object that a ``.json`` caption file would hold.

    A column that was not chosen for a role although it has a name that the object gives that role becomes
    ``column_NAME``: so a column named in the settings is the only one that counts.
    """
    out: dict[str, Any] = {}
    for role, column in roles.items():
        value = _plain(values.get(column))
        if role == "path" or value is None:
            continue
        if role == "caption" or column.lower() == "captions":
            value = _caption_cell(value, column, span)
        out[role] = value
    reserved = {
        alias
        for role in span.config.named()
        if role != "path"
        for alias in (("caption", "captions") if role == "caption" else _ALIASES[role])
    }
    for column, raw in values.items():
        value = _plain(raw)
        if value is None or column in roles.values():
            continue
        if column.lower() == "captions":
            value = _caption_cell(value, column, span)
        out[f"column_{column}" if column.lower() in reserved else column] = value
    return out


def _caption_cell(value: Any, column: str, span: TableSpan) -> Any:
    """Captions of a cell: lists without empty entries; in a text table, ``captions`` may hold a JSON list."""
    if isinstance(value, str) and span.kind == "csv" and column.lower() == "captions":
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(value)
            value = parsed if isinstance(parsed, list) else value
    return [entry for entry in value if entry is not None] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A cell as JSON can hold it; None for an empty one (also NaN, which data frames write for it)."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _one_line(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"{type(error).__name__}: {text}"[:300]
