"""``manifest.json``: what a data set folder holds. It is written last, so a folder that has one is complete.

    manifest.json   shards/<bucket>-NNNNN.tar   index/part-NNNNN.parquet   quarantine/*.parquet
    report.html   report_funnel.png   stages/ (what every stage of curation measured)

While a folder is being made it holds ``.building.json`` with the settings instead; the program that wrote it
may go on, any other refuses the folder. Beside a manifest that file says that an update was begun: the data set is
whole and in use until the manifest goes, which is when the first of its files is about to change.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_nucleus.data import index
from megatron_nucleus.data.shards import MAX_SHARD_BYTES, Location, ShardInfo, ShardWriter
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic
from megatron_nucleus.utils.staging import check_writable, explain_writing

FORMAT = "megatron-nucleus-dataset"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MARKER = ".building.json"


def claim_output(folder: str | Path, tool: str, settings: dict, *, update: bool | None = None) -> str:
    """Take ``folder`` for the output of ``tool``; returns ``new``, ``resume``, ``complete`` or ``outdated``.

    settings: everything that decides the content, as JSON values. Of an unfinished folder the caller reuses what
    still fits. update: whether a finished folder made with other settings, or one whose update was stopped, is taken
    as ``outdated`` (nothing in it is changed here: see `begin_update`); None: the program has no such mode.

    Raises:
        ConfigError: the folder is in use for something else, or finished and made with other settings, with what
            differs; or it cannot be written.
        DataError: the disk is full.
    """
    with explain_writing(folder, "nothing in it was changed"):
        return _claim(Path(folder), tool, settings, update)


def _claim(folder: Path, tool: str, settings: dict, update: bool | None) -> str:
    wanted = _plain(tool, settings)
    if (folder / MANIFEST).is_file():
        return _claim_finished(folder, wanted, update)
    check_writable(folder)
    if (folder / MARKER).is_file():
        found = _read_json(folder / MARKER)
        if found.get("tool") != tool:
            raise ConfigError(
                f"--output {folder}: holds unfinished work of {found.get('tool')}; choose another"
            )
        write_json_atomic(folder / MARKER, wanted)
        return "resume"
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"--output {folder}: not empty, and not made by this program (or its {MANIFEST} is lost); choose another "
            "folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / MARKER, wanted)
    return "new"


def _claim_finished(folder: Path, wanted: dict, update: bool | None) -> str:
    found = _read_json(folder / MANIFEST).get("settings")
    own = isinstance(found, dict) and found.get("tool") == wanted["tool"]
    if update and own:
        check_writable(folder)
        return "outdated" if found != wanted or (folder / MARKER).is_file() else "complete"
    if found == wanted:
        return "complete"
    fix = "choose another folder or remove this one"
    if update is False and own:
        fix = f"--update makes again what this changes and keeps the rest; or {fix}"
    raise ConfigError(
        f"--output {folder}: holds a finished data set made differently ({_difference(found, wanted)}); {fix}"
    )


def _plain(tool: str, settings: dict) -> dict:
    """Settings as they come back from JSON."""
    return json.loads(json.dumps({"tool": tool, **settings}))


def check_files(folder: Path, manifest: dict) -> None:
    """Whether the shards and index parts of a data set are there, in full size.

    Raises:
        DataError: names the first that is not, or a manifest that lacks them.
    """
    try:
        expected = [(s["tar"], s["bytes"]) for s in manifest["shards"]]
        expected += [(p["path"], p["bytes"]) for p in manifest["index"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'manifest.json'}: damaged ({error!r} missing); copy the data set again"
        ) from error
    for name, size in expected:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing; copy the data set again or make it again")
        if (found := (folder / name).stat().st_size) != size:
            raise DataError(
                f"{folder / name}: {found} bytes, the manifest says {size}; copy the data set again"
            )


def begin_update(folder: str | Path, tool: str, settings: dict) -> None:
    """Note in a finished folder that it is being made again with ``settings``; its manifest stands, and it is whole."""
    write_json_atomic(Path(folder) / MARKER, _plain(tool, settings))


def withdraw(folder: str | Path) -> None:
    """Make a finished folder, whose update has begun, an unfinished one: before the first of its files changes."""
    (Path(folder) / MANIFEST).unlink(missing_ok=True)


def _difference(found: Any, wanted: dict) -> str:
    if not isinstance(found, dict):
        return "its settings are unreadable"
    every = list(_differences("", found, wanted))
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more


def _differences(name: str, found: Any, wanted: Any) -> Iterator[str]:
    """``name: old there, new here`` of all values that differ, such as ``recipe[4].settings.near_max_bits``."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(f"{name}.{key}" if name else key, found.get(key), wanted.get(key))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, pair in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(f"{name}[{number}]", *pair)
    elif found != wanted:
        yield f"{name}: {_short(found)} there, {_short(wanted)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_manifest(
    folder: str | Path,
    *,
    tool: str,
    settings: dict,
    shards: list[ShardInfo],
    index_files: list[dict],
    counts: dict,
    encoded: dict | None = None,
    merged_buckets: dict | None = None,
    extra: dict | None = None,
) -> dict:
    """Write ``manifest.json`` (atomically, the last act) and remove the building marker.

    Equal content gives equal bytes: no time, host or worker count goes in.

    Args:
        settings: as given to `claim_output`. index_files: as `index.ParquetParts.close` returns them.
        counts: seen, kept, rejected, quarantined of the program that made it.
        encoded: None, or {"codec": spec, "text_encoder": spec, "resolution_px": n}.
        merged_buckets: small bucket -> bucket that took its images. extra: more keys.
    """
    folder = Path(folder)
    buckets: dict[str, dict] = {}
    for shard in shards:
        entry = buckets.setdefault(shard.bucket, {"samples": 0, "shards": 0})
        entry["samples"] += shard.samples
        entry["shards"] += 1
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "schema_version": index.SCHEMA_VERSION,
        "schema_hash": index.schema_hash(index.INDEX_SCHEMA),
        "samples": sum(s.samples for s in shards),
        "buckets": dict(sorted(buckets.items())),
        "shards": [s._asdict() for s in shards],
        "index": index_files,
        "counts": counts,
        "merged_buckets": merged_buckets or {},
        "encoded": encoded,
        "settings": _plain(tool, settings),
        **(extra or {}),
    }
    write_json_atomic(folder / MANIFEST, manifest)
    (folder / MARKER).unlink(missing_ok=True)
    return manifest


def read_manifest(folder: str | Path) -> tuple[dict, str]:
    """The manifest and the hex sha256 of its bytes.

    Raises:
        ConfigError: no such folder, a file, or nothing there that a data set would have.
        DataError: an unfinished data set, or a damaged or unknown manifest.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        wrong = "a file, not a data set folder" if folder.exists() else "no such folder"
        raise ConfigError(
            f"{folder}: {wrong}; give a data set folder that tools/curate.py or tools/encode.py made"
        )
    if not path.is_file():
        if (folder / MARKER).is_file():
            raise DataError(f"{folder}: unfinished data set; run the command that makes it again")
        raise ConfigError(
            f"{folder}: holds no {MANIFEST}; give a data set folder that tools/curate.py or tools/encode.py made"
        )
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('format_version')!r}; this "
            f"program reads {FORMAT!r} version {FORMAT_VERSION}: make the data set again with this version"
        )
    return manifest, hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); copy the data set again or make it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: damaged (no JSON object); copy the data set again or make it again")
    return value


class DatasetWriter:
    """Writes a whole data set from one process, sample by sample: shards, index, manifest.

        writer = DatasetWriter(folder, tool="encode", settings={...}, encoded={...})
        if not writer.complete:
            writer.add_file("empty_text.safetensors", payload)
            writer.add(row, {"safetensors": payload, "json": info})
            writer.finish(counts={...})

    An unfinished folder of the same tool and settings is started afresh; a finished one sets ``complete``.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tool: str,
        settings: dict,
        encoded: dict | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        """Arguments as `claim_output` and `write_manifest` take them; raises what `claim_output` raises."""
        self.folder, self.tool, self.settings, self.encoded = Path(folder), tool, settings, encoded
        self.max_shard_bytes = max_shard_bytes
        self.complete = claim_output(folder, tool, settings) == "complete"
        self._writers: dict[str, ShardWriter] = {}
        if not self.complete:
            for name in ("shards", "index"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._index = index.ParquetParts(self.folder / "index", index.INDEX_SCHEMA)

    def add(self, row: dict, members: dict[str, bytes]) -> Location:
        """Append one sample.

        row: index columns but tar, offset and length; ``id`` and ``aspect_bucket`` are needed.
        members: extension -> payload, the primary one first.
        """
        bucket = row["aspect_bucket"]
        writer = self._writers.get(bucket)
        if writer is None:
            writer = self._writers[bucket] = ShardWriter(self.folder, bucket, self.max_shard_bytes)
        location = writer.add(row["id"], members)
        self._index.add({**row, "tar": location.tar, "offset": location.offset, "length": location.length})
        return location

    def add_file(self, name: str, payload: bytes) -> None:
        """Write a file beside the shards, such as ``empty_text.safetensors``."""
        write_atomic(self.folder / name, payload)

    def finish(self, counts: dict, **extra: Any) -> dict:
        """Close shards and index, write the manifest; returns it."""
        shards = [info for _, writer in sorted(self._writers.items()) for info in writer.close()]
        return write_manifest(
            self.folder,
            tool=self.tool,
            settings=self.settings,
            shards=shards,
            index_files=self._index.close(),
            counts=counts,
            encoded=self.encoded,
            extra=extra,
        )

    def abort(self) -> None:
        """Drop unfinished shards; the folder stays marked as unfinished."""
        for writer in self._writers.values():
            writer.abort()
