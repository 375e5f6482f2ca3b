"""Output folders: those that appear whole or not at all, and one-line errors where nothing can be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_nucleus.utils.errors import ConfigError, DataError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    if error.errno in FULL_DISK:
        return DataError(
            f"{target}: cannot be written ({reason}); free some space there and run again; {keeps}"
        )
    return ConfigError(
        f"{target}: cannot be written ({reason}); choose a folder that can be written; {keeps}"
    )


@contextlib.contextmanager
def explain_writing(target: str | Path, keeps: str) -> Iterator[None]:
    """Turn an OSError about ``target``, or a full disk, into `explain_write_error`; any other passes unchanged."""
    try:
        yield
    except OSError as error:
        if not _concerns(error, Path(target)):
            raise
        raise explain_write_error(error, Path(target), keeps) from error


def _concerns(error: OSError, target: Path) -> bool:
    """Whether it names a path in ``target`` or a folder above; write and fsync name none: whether a disk is full."""
    if not isinstance(error.filename, str | bytes):
        return error.errno in FULL_DISK
    named, target = Path(os.path.abspath(os.fsdecode(error.filename))), Path(os.path.abspath(target))
    return named.is_relative_to(target) or target.is_relative_to(named)


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


def check_writable(target: str | Path, option: str = "--output") -> None:
    """ConfigError unless ``target``, or the nearest path above it that exists, is a folder to write in."""
    path = Path(target).absolute()
    nearest = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not nearest.is_dir():
        raise ConfigError(f"{option} {target}: {nearest} is a file; name a new folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {target}: {nearest} cannot be written; name another folder")


def check_free(target: Path, option: str = "--output") -> None:
    """ConfigError unless ``target`` can be written and is missing or an empty folder."""
    check_writable(target, option)
    try:
        if target.is_dir() and any(target.iterdir()):
            raise ConfigError(f"{option} {target}: is not empty; name a new folder or remove it first")
    except OSError as error:
        raise explain_write_error(error, target, "nothing was left there") from error
