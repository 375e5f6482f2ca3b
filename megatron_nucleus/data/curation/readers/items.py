"""What readers hand on: items that refer to bytes."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import NamedTuple

from megatron_nucleus.data.images import UnusableImage

SIDECAR_EXTENSIONS = ("json", "txt")  # JSON first: of equal texts the one with provenance stays
READ_REASONS = frozenset(  # everything that listing and reading find wrong
    {
        "bad_row",
        "compressed_tar",
        "damaged_table",
        "damaged_tar",
        "duplicate_member",
        "file_too_large",
        "missing_file",
        "not_a_file",
        "unreadable",
        "unsafe_member",
        "unsafe_path",
    }
)
_COMPRESSED_TAR = re.compile(rb"\.(tgz|tbz2|txz|tar\.(gz|bz2|xz|zst|lz4))$", re.IGNORECASE)


class Reference(NamedTuple):
    """Where bytes lie: a file (offset None) or a span of one. path: relative to the input, as the system has it."""

    path: bytes
    offset: int | None = None
    length: int | None = None


class Item(NamedTuple):
    """Something that may be an image. problem: (reason, detail) when it is known to be unusable already.

    name: readable, unique inside the input. sidecars: (name, reference) of its caption files. given: what the row of
    a table says about it, a JSON object with the keys of a ``.json`` caption file.
    """

    name: str
    reference: Reference
    sidecars: tuple[tuple[str, Reference], ...] = ()
    problem: tuple[str, str] | None = None
    given: str | None = None


def extension(path: bytes) -> str:
    """Lower-case extension without the dot."""
    return os.path.splitext(path)[1][1:].lower().decode("ascii", "replace")


def readable(path: bytes) -> str:
    """A path as text that any program can store: bytes outside UTF-8 become ``\\xNN``."""
    return path.decode("utf-8", "backslashreplace")


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
