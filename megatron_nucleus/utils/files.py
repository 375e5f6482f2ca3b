"""Small file helpers: atomic writes, checksums, and a lock on a folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_nucleus.utils.errors import ConfigError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a file to write, under a temporary name in the same folder; after the block fsync, then rename.

    Readers see the old or the new file; after an error the old one is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """`open_atomic` for content that is in memory."""
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json_atomic(path: str | Path, value: object) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256_file(path: str | Path, chunk_bytes: int = 1 << 22) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def exclusive(folder: str | Path, option: str) -> Iterator[None]:
    """Keep every other process out of ``folder`` inside the block, through a lock on the file ``.lock`` in it.

    The lock belongs to this process alone (POSIX record lock): forked workers do not hold it, and the system
    releases it when the process ends, however it ends. Within one process it keeps nobody out.

    Args:
        option: flag that named the folder, for the message.

    Raises:
        ConfigError: another process holds the folder.
    """
    path = Path(folder) / ".lock"
    busy = ConfigError(
        f"{option} {folder}: another process is writing there; wait for it or name another folder"
    )
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise busy from None
        except OSError as error:  # some network file systems are mounted without locks
            log.warning("%s cannot be locked (%s): start no second process there", path, error.strerror)
        if os.fstat(file.fileno()).st_nlink == 0:  # removed by the process that just left: ours locks nothing
            raise busy
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
