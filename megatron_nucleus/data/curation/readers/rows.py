"""Rows of CSV, TSV, JSONL and Parquet files, streamed: what was read, or what is wrong with it.

Text files are UTF-8 with lines that end in LF or CR LF; blank lines are no rows. CSV is RFC 4180: a field with a
separator or line break in it, or a quote at its beginning, is quoted, and quotes in it are doubled. A line that
cannot be read costs itself alone: the next one begins behind its line break. No row is longer than
`MAX_ROW_BYTES`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

MAX_ROW_BYTES = 1 << 20  # own choice, as much as a caption file may have
_ROWS_PER_BATCH = 4096  # own choice


class Row(NamedTuple):
    """One row. offset, length: its bytes in a text file. value: fields or object, None when damaged."""

    offset: int | None
    length: int | None
    value: Any
    damage: str = ""


class _Lines:
    """Lines of a file with their offsets; lines can be put back."""

    def __init__(self, file: BinaryIO, offset: int):
        file.seek(offset)
        self._file, self._offset = file, offset
        self._back: list[tuple[int, bytes]] = []

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        while self._back or (line := self._file.readline(MAX_ROW_BYTES + 1)):
            if self._back:
                yield self._back.pop()
                continue
            offset = self._offset
            self._offset += len(line)
            if len(line) > MAX_ROW_BYTES:
                self._skip_line()
            yield offset, line

    def _skip_line(self) -> None:
        """Pass over the rest of a line of which more than `MAX_ROW_BYTES` were read."""
        while rest := self._file.readline(MAX_ROW_BYTES):
            self._offset += len(rest)
            if rest.endswith(b"\n"):
                return

    def put_back(self, lines: Sequence[tuple[int, bytes]]) -> None:
        """Lines, in order, that come again."""
        self._back.extend(reversed(lines))


def text_rows(file: BinaryIO, kind: str, offset: int = 0, separator: str = ",") -> Iterator[Row]:
    """Rows of a CSV (header included) or JSONL file from a byte at which one begins."""
    lines = _Lines(file, offset)
    for start, line in lines:
        if not line.strip():
            continue
        if len(line) > MAX_ROW_BYTES:
            yield Row(start, len(line), None, f"longer than {MAX_ROW_BYTES} bytes")
            continue
        try:
            text = line.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            yield Row(start, len(line), None, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
            continue
        if kind == "jsonl":
            yield _json_row(start, line, text)
        elif '"' in text:
            yield _quoted_row(start, line, text, lines, separator)
        elif "\r" in text.rstrip("\r\n"):
            yield Row(start, len(line), None, "a carriage return inside the line; save it with LF line ends")
        else:
            yield Row(start, len(line), text.rstrip("\r\n").split(separator))


def _json_row(start: int, line: bytes, text: str) -> Row:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        return Row(start, len(line), None, f"not valid JSON ({error})")
    if not isinstance(value, dict):
        return Row(start, len(line), None, "no JSON object")
    return Row(start, len(line), value)


def _quoted_row(start: int, line: bytes, text: str, lines: _Lines, separator: str) -> Row:
    """A row with quotes, which may go on over further lines."""
    more: list[tuple[int, bytes]] = []

    def following() -> Iterator[str]:
        yield text
        for entry in lines:
            more.append(entry)
            yield entry[1].decode("utf-8")

    try:
        fields = next(csv.reader(following(), delimiter=separator, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        lines.put_back(more)
        return Row(start, len(line), None, f"not a CSV row ({error})")
    return Row(start, len(line) + sum(len(entry[1]) for entry in more), fields)


def parquet_rows(file: BinaryIO, columns: Sequence[str], first: int, rows: int) -> Iterator[Row]:
    """``rows`` rows of a Parquet file from row ``first`` (from 0); reads the row groups that they lie in.

    Raises:
        pa.ArrowException, OSError: damaged.
    """
    table = pq.ParquetFile(file, page_checksum_verification=True)
    begin = 0
    for group in range(table.metadata.num_row_groups):
        end = begin + table.metadata.row_group(group).num_rows
        if end > first and begin < first + rows:
            wanted = slice(max(first - begin, 0), min(first + rows, end) - begin)
            yield from _group_rows(table, group, columns, wanted)
        begin = end


def _group_rows(table: pq.ParquetFile, group: int, columns: Sequence[str], wanted: slice) -> Iterator[Row]:
    at = 0
    for batch in table.iter_batches(_ROWS_PER_BATCH, [group], columns=list(columns)):
        low, high = max(wanted.start - at, 0), min(wanted.stop - at, len(batch))
        if low < high:
            part = batch.slice(low, high - low)
            plain = [_without_times(column) for column in part.columns]
            yield from _batch_rows(pa.RecordBatch.from_arrays(plain, part.schema.names))
        at += len(batch)
        if at >= wanted.stop:
            return


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """Rows of a batch; one with a value that Python cannot hold (text that is not UTF-8) is damaged, alone."""
    try:
        values = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            yield Row(None, None, None, " ".join(str(error).split()))
            return
        for i in range(len(batch)):
            yield from _batch_rows(batch.slice(i, 1))
        return
    for value in values:
        yield Row(None, None, value)


def _without_times(column: pa.Array) -> pa.Array:
    """Times as text and durations as numbers: Python's own types have no nanoseconds."""
    if not pa.types.is_temporal(column.type):
        return column
    return column.cast(pa.int64() if pa.types.is_duration(column.type) else pa.string())


def parquet_schema(file: BinaryIO) -> tuple[pa.Schema, int]:
    """Columns and number of rows.

    Raises:
        pa.ArrowException, OSError: damaged.
    """
    table = pq.ParquetFile(file)
    return table.schema_arrow, table.metadata.num_rows


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, plain or as a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes, alone or inside lists and structs."""
    checks = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    if pa.types.is_struct(kind):
        return any(is_binary(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return is_binary(kind.value_type)
    return any(check(kind) for check in checks)
