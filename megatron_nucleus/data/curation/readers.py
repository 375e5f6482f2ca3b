"""Input -> tasks -> items: a folder of images with caption files beside them, and WebDataset tars, in any mix.

Scanning looks at names, sizes and times of change only and cuts the input into tasks, always the same for the same
names. Items carry references, not bytes. Nothing from an input tar is ever written under a name that the tar chose.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_nucleus.data.images import IMAGE_EXTENSIONS, UnusableImage
from megatron_nucleus.utils.errors import ConfigError

FILES_PER_TASK = 512
SIDECAR_EXTENSIONS = ("json", "txt")  # JSON first: of equal texts the one with provenance stays
_COMPRESSED_TAR = re.compile(rb"\.(tgz|tbz2|txz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)


class Reference(NamedTuple):
    """Where bytes lie: a file (offset None) or a span of one. path: relative to the input, as the system has it."""

    path: bytes
    offset: int | None = None
    length: int | None = None


class Item(NamedTuple):
    """Something that may be an image. problem: (reason, detail) when it is known to be unusable already.

    name: readable, unique inside the input. sidecars: (name, reference) of its caption files.
    """

    name: str
    reference: Reference
    sidecars: tuple[tuple[str, Reference], ...] = ()
    problem: tuple[str, str] | None = None


class Task(NamedTuple):
    """A piece of the input for one call of a stage: some files of the folder, or one tar."""

    name: str
    root: str
    tar: bytes | None
    items: tuple[Item, ...]


class Scan(NamedTuple):
    """The input at a glance. ignored: files that are neither images nor captions.

    fingerprint: over all names and sizes, the same for a copy of the input; an edit that keeps the size does not
    change it. stamp: over names, sizes and times of change, so that any edit changes it, and copying too.
    """

    tasks: list[Task]
    fingerprint: str
    stamp: str
    files: int
    tars: int
    ignored: int
    captions_without_image: int


def scan(root: str | Path) -> Scan:
    """List the input folder (recursively, in name order, following links) and cut it into tasks.

    Raises:
        ConfigError: no such folder.
    """
    base = os.fsencode(root)
    if not os.path.isdir(base):
        kind = "is not a folder" if os.path.exists(base) else "no such folder"
        raise ConfigError(
            f"--input {root}: {kind}; give a folder of images with captions, or of WebDataset tars"
        )
    if not os.access(base, os.R_OK | os.X_OK):
        raise ConfigError(f"--input {root}: cannot be listed; check its permissions")
    digest, times = hashlib.sha256(), hashlib.sha256()
    paths, ignored = [], 0
    for path, size, changed_ns in _walk(base, b"", set()):
        digest.update(path + b"\0" + str(size).encode() + b"\n")
        times.update(str(changed_ns).encode() + b"\n")
        if os.path.basename(path).startswith(b".") or b"__MACOSX" in path.split(b"/"):
            ignored += 1
        else:
            paths.append(path)
    tars = [p for p in paths if extension(p) == "tar"]
    stems = {os.path.splitext(p)[0] for p in tars}
    items, orphans, side = _pair(p for p in paths if extension(p) != "tar" and not _is_tar_record(p, stems))
    ignored += len(paths) - len(tars) - len(items) - side - orphans
    tasks = [
        Task(f"files-{n:06d}", os.fsdecode(base), None, tuple(items[i : i + FILES_PER_TASK]))
        for n, i in enumerate(range(0, len(items), FILES_PER_TASK))
    ]
    tasks += [Task(f"tar-{n:06d}", os.fsdecode(base), path, ()) for n, path in enumerate(tars)]
    fingerprint = digest.hexdigest()
    return Scan(tasks, fingerprint, fingerprint + times.hexdigest(), len(items), len(tars), ignored, orphans)


def _walk(base: bytes, folder: bytes, above: set[tuple[int, int]]) -> Iterator[tuple[bytes, int, int]]:
    """(relative path, size, mtime in ns) of everything that is not a folder, sorted; link loops are entered once."""
    here = os.path.join(base, folder)
    info = os.stat(here)
    if (info.st_dev, info.st_ino) in above:
        return
    above = above | {(info.st_dev, info.st_ino)}
    try:
        with os.scandir(here) as listing:
            entries = sorted(listing, key=lambda e: e.name)
    except PermissionError:
        yield folder, 0, 0  # becomes an item that cannot be read
        return
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.is_dir():
            yield from _walk(base, path, above)
        else:
            try:
                found = entry.stat()
                yield path, found.st_size, found.st_mtime_ns
            except OSError:
                yield path, 0, 0


def _is_tar_record(path: bytes, tar_stems: set[bytes]) -> bool:
    """``00000.parquet`` and ``00000_stats.json``, which img2dataset writes beside ``00000.tar``."""
    stem, suffix = os.path.splitext(path)
    return (suffix == b".parquet" and stem in tar_stems) or (
        suffix == b".json" and stem.endswith(b"_stats") and stem[: -len(b"_stats")] in tar_stems
    )


def _pair(paths: Iterator[bytes]) -> tuple[list[Item], int, int]:
    """Join images with their caption files by path without extension; (items, orphan and used captions)."""
    sidecars: dict[bytes, list[bytes]] = {}
    candidates = []
    for path in paths:
        if extension(path) in SIDECAR_EXTENSIONS:
            sidecars.setdefault(os.path.splitext(path)[0], []).append(path)
        else:
            candidates.append(path)
    items = []
    used: set[bytes] = set()
    for path in candidates:
        stem = os.path.splitext(path)[0]
        used.add(stem)
        beside = sorted(sidecars.get(stem, ()), key=lambda p: SIDECAR_EXTENSIONS.index(extension(p)))
        items.append(
            Item(readable(path), Reference(path), tuple((readable(p), Reference(p)) for p in beside))
        )
    orphans = sum(len(p) for stem, p in sidecars.items() if stem not in used)
    return items, orphans, sum(map(len, sidecars.values())) - orphans


def extension(path: bytes) -> str:
    """Lower-case extension without the dot."""
    return os.path.splitext(path)[1][1:].lower().decode("ascii", "replace")


def readable(path: bytes) -> str:
    """A path as text that any program can store: bytes outside UTF-8 become ``\\xNN``."""
    return path.decode("utf-8", "backslashreplace")


def task_items(task: Task) -> list[Item]:
    """The items of a task; a tar is listed here, by its headers."""
    return list(task.items) if task.tar is None else _tar_items(task.root, task.tar)


def read_reference(root: str, reference: Reference, max_bytes: int) -> bytes:
    """Bytes of a reference.

    Raises:
        UnusableImage: unreadable, not_a_file, compressed_tar, or file_too_large (more than ``max_bytes``).
    """
    path = os.path.join(os.fsencode(root), reference.path)
    if reference.offset is None and _COMPRESSED_TAR.search(path):
        raise UnusableImage("compressed_tar", "unpack it to a plain .tar first")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not block
    except OSError as error:
        reason = "not_a_file" if error.errno == errno.ENXIO else "unreadable"
        raise UnusableImage(reason, str(error.strerror)) from error
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise UnusableImage("not_a_file", stat.filemode(info.st_mode))
        length = info.st_size if reference.length is None else reference.length
        if length > max_bytes:
            raise UnusableImage("file_too_large", f"{length} bytes, limit {max_bytes}")
        payload = _pread_all(handle, length, reference.offset or 0)
    except OSError as error:
        raise UnusableImage("unreadable", str(error.strerror)) from error
    finally:
        os.close(handle)
    if len(payload) != length:
        raise UnusableImage("unreadable", f"{len(payload)} of {length} bytes")
    return payload


def _pread_all(handle: int, length: int, offset: int) -> bytes:
    parts = []
    while length > 0 and (part := os.pread(handle, min(length, 1 << 30), offset)):
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Member(NamedTuple):
    name: bytes
    offset: int
    length: int
    regular: bool


def _tar_items(root: str, tar: bytes) -> list[Item]:
    """Items of one tar, whatever the order of its members. A damaged rest is one item with reason damaged_tar."""
    members, damage = list_tar(os.path.join(os.fsencode(root), tar))
    label = readable(tar)
    sidecars: dict[bytes, dict[str, Reference]] = {}
    candidates, with_image = [], set()
    for member in members:
        kind = extension(member.name)
        if _unsafe(member.name) or not member.regular:
            candidates.append(member)
        elif kind in SIDECAR_EXTENSIONS:
            reference = Reference(tar, member.offset, member.length)
            sidecars.setdefault(os.path.splitext(member.name)[0], {})[kind] = reference
        elif not os.path.basename(member.name).startswith(b"."):
            candidates.append(member)
            if kind in IMAGE_EXTENSIONS:
                with_image.add(sample_key(member.name))
    items = [
        _tar_item(label, tar, member, sidecars)
        for member in candidates
        if _unsafe(member.name)
        or not member.regular
        or extension(member.name) in IMAGE_EXTENSIONS
        or sample_key(member.name) not in with_image  # else other data of a sample that has an image
    ]
    if damage:
        items.append(Item(f"{label} (rest)", Reference(tar), (), ("damaged_tar", damage)))
    return items


def _tar_item(label: str, tar: bytes, member: _Member, sidecars: dict[bytes, dict[str, Reference]]) -> Item:
    name = f"{label}/{readable(member.name)}"
    reference = Reference(tar, member.offset, member.length)
    if _unsafe(member.name):
        return Item(name, reference, (), ("unsafe_member", "absolute path or '..' in the member name"))
    if not member.regular:
        return Item(name, reference, (), ("not_a_file", "link, device or sparse member"))
    stem, key = os.path.splitext(member.name)[0], sample_key(member.name)
    found = {**sidecars.get(key, {}), **sidecars.get(stem, {})}
    beside = [(f"{label}/{readable(stem)}.{k}", found[k]) for k in SIDECAR_EXTENSIONS if k in found]
    return Item(name, reference, tuple(beside))


def sample_key(name: bytes) -> bytes:
    """WebDataset's key of a member: its path up to the first dot of the file name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(b".", 1)[0])


def _unsafe(name: bytes) -> bool:
    parts = re.split(rb"[/\\]", name)
    return name[:1] in (b"/", b"\\") or b".." in parts or re.match(rb"[A-Za-z]:", name) is not None


def list_tar(path: bytes) -> tuple[list[_Member], str | None]:
    """Members of a plain tar up to its end or to the first damage, and what the damage is (None: none)."""
    members: list[_Member] = []
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return [], "compressed with gzip; unpack it to a plain .tar first"
            return members, _list_members(file, size, members)
    except OSError as error:
        return members, f"cannot be read ({error.strerror})"


def _list_members(file: BinaryIO, size: int, members: list[_Member]) -> str | None:
    """Header by header, so that damage is seen (iterating a TarFile just ends) and no list of headers grows."""
    file.seek(0)
    try:
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        return f"at byte 0: {error}"
    archive.offset = 0
    while True:
        start = archive.offset
        file.seek(start)
        try:
            info = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:
            return _rest_is_empty(file, start)
        except tarfile.EmptyHeaderError:
            return f"ends at byte {start} without an end marker"
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            return f"at byte {start}: {error}"
        if info.size < 0 or archive.offset <= start:
            return f"at byte {start}: impossible size {info.size}"
        if info.isreg() and info.offset_data + info.size > size:
            return f"member {info.name!a} at byte {start} is cut off"
        if not info.isdir():
            plain = info.isreg() and not info.issparse()
            name = re.sub(rb"^(\./)+", b"", info.name.encode("utf-8", "surrogateescape"))
            members.append(_Member(name, info.offset_data, info.size, plain))


def _rest_is_empty(file: BinaryIO, start: int) -> str | None:
    file.seek(start)
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            return f"data behind the end marker at byte {start}; were several tars joined? split them"
    return None
