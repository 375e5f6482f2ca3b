"""A folder of images with caption files beside them: what is there, and what belongs together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from megatron_nucleus.data.curation.readers.items import (
    SIDECAR_EXTENSIONS,
    Item,
    Reference,
    extension,
    readable,
)


def walk(
    base: bytes, folder: bytes = b"", above: frozenset = frozenset()
) -> Iterator[tuple[bytes, int, int]]:
    """(relative path, size, mtime in ns) of everything that is not a folder, sorted; link loops are entered once."""
    here = os.path.join(base, folder)
    info = os.stat(here)
    if (info.st_dev, info.st_ino) in above:
        return
    above = above | {(info.st_dev, info.st_ino)}
    try:
        with os.scandir(here) as listing:
            entries = sorted(listing, key=lambda e: e.name)
    except OSError:
        yield folder, 0, 0  # becomes an item that cannot be read
        return
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if _is_folder(entry):
            yield from walk(base, path, above)
        else:
            try:
                found = entry.stat()
                yield path, found.st_size, found.st_mtime_ns
            except OSError:
                yield path, 0, 0


def _is_folder(entry: os.DirEntry) -> bool:
    """False also for a link that leads nowhere or in a circle: then it is an item that cannot be read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_hidden(path: bytes) -> bool:
    """Files that programs leave behind: names with a leading dot, and macOS's shadow folders."""
    return os.path.basename(path).startswith(b".") or b"__MACOSX" in path.split(b"/")


def pair(paths: Iterable[bytes], named: set[bytes]) -> tuple[list[Item], int, int]:
    """Join images with their caption files by path without extension.

    Args:
        named: files that tables name; the table lists them, but caption files beside them are theirs.

    Returns:
        Items, and how many caption files have no image and how many have one.
    """
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
        if path not in named:
            beside = sorted(sidecars.get(stem, ()), key=lambda p: SIDECAR_EXTENSIONS.index(extension(p)))
            items.append(
                Item(readable(path), Reference(path), tuple((readable(p), Reference(p)) for p in beside))
            )
    orphans = sum(len(p) for stem, p in sidecars.items() if stem not in used)
    return items, orphans, sum(map(len, sidecars.values())) - orphans
