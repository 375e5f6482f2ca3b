"""Output folders that appear whole or not at all, and one-line errors for disks that refuse."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_nucleus.utils.errors import ConfigError, DataError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind ``error``, through causes, contexts and collections of per-rank failures."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        error = queue.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, OSError):
            return error
        queue += [error.__cause__, error.__context__]
        for failure in getattr(error, "failures", {}).values():  # CheckpointException: rank -> (error, trace)
            queue.append(failure[0] if isinstance(failure, tuple) else failure)
    return None


def explain_write_error(error: OSError, target: Path, keeps: str) -> Exception:
    """ConfigError for a place that cannot be written, DataError for a full disk; ``keeps`` says what is still whole."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return DataError(
            f"{target}: cannot be written ({reason}); free some space there and run again; {keeps}"
        )
    return ConfigError(
        f"{target}: cannot be written ({reason}); choose a folder that can be written; {keeps}"
    )


@contextlib.contextmanager
def staged_folder(target: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` that becomes ``target`` when the block ends without an error.

    After an error nothing is left; after a kill only the hidden ``.NAME.tmpPID`` folder.

    Args:
        target: folder to create; it may exist when it is empty.
        needed_bytes: refuse early when the disk has less than this free.

    Raises:
        ConfigError: ``target`` exists and is not an empty folder, or cannot be written.
        DataError: the disk is full.
    """
    target = target.absolute()
    check_free(target)
    staging = target.parent / f".{target.name}.tmp{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if needed_bytes > free:
            raise DataError(
                f"{target}: needs {needed_bytes} bytes and the disk has {free} free; free some space there"
            )
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        for folder in (staging, *(p for p in staging.rglob("*") if p.is_dir())):
            fsync_folder(folder)
        os.replace(staging, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise explain_write_error(error, target, "nothing was left there") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(target: Path, option: str = "--output") -> None:
    """ConfigError unless ``target`` is missing or an empty folder."""
    try:
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{option} {target}: is a file; name a new folder")
        if target.is_dir() and any(target.iterdir()):
            raise ConfigError(f"{option} {target}: is not empty; name a new folder or remove it first")
    except OSError as error:
        raise explain_write_error(error, target, "nothing was left there") from error
