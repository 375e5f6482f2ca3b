"""Sharded tensors to files and back, by torch.distributed.checkpoint: every rank writes and reads its own pieces.

The files are safetensors; no pickle and no metadata file. They load into any number of ranks and any layout.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint as dcp

from megatron_nucleus.export import native
from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.export.safetensors_stream import assign_shards
from megatron_nucleus.training.checkpointing.agreement import Ranks, portable, shared_error
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.staging import explain_write_error
from megatron_nucleus.utils.tensors import local

# torch builds each file in memory and holds Python's lock meanwhile (0.3 s for 400 MB): a pause of the training beside
# a save in the background, so files are small.
_FILE_BYTES = 256 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FLEETING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN)
_KEPT = "checkpoints written before stay usable"


def write_tensors(ranks: Ranks, tensors: Mapping[str, Tensor], folder: Path, target: Path) -> dict[str, dict]:
    """Write tensors into ``folder``; a piece that several ranks hold is written by one of them.

    Args:
        tensors: contiguous, the same names on every rank; DTensors, or plain tensors that are equal on all ranks.
        folder: exists; every rank reaches it. target: what messages call it.

    Returns:
        manifest entries {"bytes", "sha256"} of the files of all ranks by name; they are on disk (fsync).

    Raises:
        ConfigError, DataError: see `explained`; the same on every rank.
    """
    # torch takes the numbers of rank 0, whose pieces are never smaller than those of the others.
    sizes = {name: TensorInfo(tuple(local(t).shape), t.dtype) for name, t in tensors.items()}
    shards = assign_shards(sizes, _FILE_BYTES)
    numbers = {name: i for i, shard in enumerate(shards, start=1) for name in shard}
    writer = _Writer(folder, numbers, target)
    with _shared_errors(ranks):
        dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.group is None)
    return {name: entry for files in ranks.on_all(lambda: writer.files) for name, entry in files.items()}


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as `write_tensors` takes them; only those that are not contiguous are copied."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def read_tensors(ranks: Ranks, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill ``tensors`` in place from the files in ``folder``, whatever ranks wrote them.

    A rank reads what it holds, one piece at a time; beside the tensors it needs memory for the largest piece.

    Raises:
        DataError: a file that cannot be read; the same on every rank. ``tensors`` may be filled in part.
    """
    readers: list[_Reader] = []
    ranks.on_all(lambda: readers.append(_Reader(folder)))
    with _shared_errors(ranks), torch.no_grad():
        values = {name: t.detach() for name, t in tensors.items()}
        dcp.load(values, storage_reader=readers[0], process_group=ranks.group, no_dist=ranks.group is None)


class _Writer(dcp.HuggingFaceStorageWriter):
    """Describes the files of this rank, in ``files``, as soon as they are written."""

    def __init__(self, folder: Path, numbers: dict[str, int], target: Path):
        super().__init__(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
        self.folder, self.target = folder, target
        self.files: dict[str, dict] = {}

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        with _portably(), explained(self.target):
            return super().prepare_local_plan(plan)

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        with _portably(), explained(self.target):
            future = super().write_data(plan, planner)
            for name in {result.storage_data.relative_path for result in future.wait()}:
                self.files[name] = _settle(self.folder / name)
            return future


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads the headers at once: an error inside of dcp.load would lose its message."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.folder = folder
        with _readable(folder):
            self.headers = super().read_metadata()

    def read_metadata(self) -> dcp.Metadata:
        return self.headers

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future:
        with _portably(), _readable(self.folder):
            return super().read_data(plan, planner)


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn an OSError while ``target`` is saved into an error that says what to do.

    Raises:
        DataError: the disk is full, or the file system failed, which may pass. ConfigError: a place that cannot be
            written.
    """
    try:
        yield
    except OSError as error:
        raise _explain(error, target) from error


def _explain(error: OSError, target: Path) -> Exception:
    host = socket.gethostname()
    if error.errno in _FULL:
        existing = next(p for p in (target, *target.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        return explain_write_error(error, target, f"{host} sees {free} bytes free there; {_KEPT}")
    if error.errno in _FLEETING:
        return DataError(
            f"{target}: cannot be written ({error.strerror}, on {host}); check the file system; {_KEPT}"
        )
    return explain_write_error(error, target, f"seen on {host}; {_KEPT}")


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{folder}: cannot be read ({text}, on {socket.gethostname()})") from error


@contextlib.contextmanager
def _portably() -> Iterator[None]:
    """Let no exception out that could not be unpickled on another rank: there torch would wait for ever."""
    try:
        yield
    except Exception as error:
        raise portable(error) from error


@contextlib.contextmanager
def _shared_errors(ranks: Ranks) -> Iterator[None]:
    """torch gathers the errors of all ranks; raise the one to show."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        failures = {rank: failure[0] for rank, failure in error.failures.items()}
        raise shared_error(failures, ranks.world) from error


def _settle(path: Path) -> dict:
    """Make a file durable (torch does so before its last bytes are flushed) and describe it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return native.describe_file(path)
