"""WebDataset tars, as img2dataset writes them and in any other order: members by their headers, nothing unpacked.

Of several members of one name the first counts; the others are items with problem ``duplicate_member`` (readers of
such a tar disagree on which one is meant).
"""

from __future__ import annotations

import os
import re
import tarfile
from typing import BinaryIO, NamedTuple

from megatron_nucleus.data.curation.readers.items import (
    SIDECAR_EXTENSIONS,
    Item,
    Reference,
    extension,
    readable,
)
from megatron_nucleus.data.images import IMAGE_EXTENSIONS


class Member(NamedTuple):
    """An entry of a tar that is no folder. offset, length: of its bytes."""

    name: bytes
    offset: int
    length: int
    regular: bool


class _Candidate(NamedTuple):
    """A member that may be an item. name: of the item, unique in the tar."""

    member: Member
    name: str
    problem: tuple[str, str] | None


def tar_items(root: str, tar: bytes) -> list[Item]:
    """Items of one tar, whatever the order of its members. A damaged rest is one item with reason damaged_tar."""
    members, damage = list_tar(os.path.join(os.fsencode(root), tar))
    label = readable(tar)
    sidecars: dict[bytes, list[Member]] = {}  # of one name without extension
    candidates: list[_Candidate] = []
    with_image, seen = set(), set()
    for member in members:
        problem = _problem(member, seen)
        again = f" (at byte {member.offset})" if member.name in seen else ""
        candidate = _Candidate(member, f"{label}/{readable(member.name)}{again}", problem)
        seen.add(member.name)
        if problem is not None:
            candidates.append(candidate)
        elif extension(member.name) in SIDECAR_EXTENSIONS:
            sidecars.setdefault(os.path.splitext(member.name)[0], []).append(member)
        elif not os.path.basename(member.name).startswith(b"."):
            candidates.append(candidate)
            if extension(member.name) in IMAGE_EXTENSIONS:
                with_image.add(sample_key(member.name))
    items = [
        Item(
            name,
            Reference(tar, member.offset, member.length),
            _beside(label, tar, member, sidecars, problem),
            problem,
        )
        for member, name, problem in candidates
        if problem is not None
        or extension(member.name) in IMAGE_EXTENSIONS
        or sample_key(member.name) not in with_image  # else other data of a sample that has an image
    ]
    if damage:
        items.append(Item(f"{label} (rest)", Reference(tar), (), ("damaged_tar", damage)))
    return items


def _problem(member: Member, seen: set[bytes]) -> tuple[str, str] | None:
    if is_unsafe(member.name):
        return "unsafe_member", "absolute path or '..' in the member name"
    if not member.regular:
        return "not_a_file", "link, device or sparse member"
    if member.name in seen:
        return "duplicate_member", "a member of that name comes before; the first counts"
    return None


def _beside(
    label: str,
    tar: bytes,
    member: Member,
    sidecars: dict[bytes, list[Member]],
    problem: tuple[str, str] | None,
) -> tuple[tuple[str, Reference], ...]:
    """Caption members of an image: those of its whole name, and of its key where that kind is not among them."""
    if problem is not None:
        return ()
    stem, key = os.path.splitext(member.name)[0], sample_key(member.name)
    own = sidecars.get(stem, [])
    kinds = {extension(m.name) for m in own}
    shared = [m for m in sidecars.get(key, []) if stem != key and extension(m.name) not in kinds]
    found = sorted(own + shared, key=lambda m: SIDECAR_EXTENSIONS.index(extension(m.name)))
    return tuple((f"{label}/{readable(m.name)}", Reference(tar, m.offset, m.length)) for m in found)


def sample_key(name: bytes) -> bytes:
    """WebDataset's key of a member: its path up to the first dot of the file name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(b".", 1)[0])


def is_unsafe(name: bytes) -> bool:
    """Whether a path is absolute, on any system, or has a ``..`` in it."""
    parts = re.split(rb"[/\\]", name)
    return name[:1] in (b"/", b"\\") or b".." in parts or re.match(rb"[A-Za-z]:", name) is not None


def list_tar(path: bytes) -> tuple[list[Member], str | None]:
    """Members of a plain tar up to its end or to the first damage, and what the damage is (None: none)."""
    members: list[Member] = []
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return [], "compressed with gzip; unpack it to a plain .tar first"
            return members, _list_members(file, size, members)
    except OSError as error:
        return members, f"cannot be read ({error.strerror})"


def _list_members(file: BinaryIO, size: int, members: list[Member]) -> str | None:
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
            members.append(Member(name, info.offset_data, info.size, plain))


def _rest_is_empty(file: BinaryIO, start: int) -> str | None:
    file.seek(start)
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            return f"data behind the end marker at byte {start}; were several tars joined? split them"
    return None
