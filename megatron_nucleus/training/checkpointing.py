"""Save and resume a run: torch.distributed.checkpoint shards, complete or absent, and an atomic ``latest``.

Layout: `export/native.py`. Order of a save: everything into ``.tmp_step_x``, fsync, manifest with checksums,
rename to ``step_x``, then replace ``latest``. A kill at any point leaves the previous ``latest`` valid.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp

from megatron_nucleus.export import native
from megatron_nucleus.export.safetensors_stream import assign_shards
from megatron_nucleus.export.tensor_store import TensorInfo
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import write_json_atomic
from megatron_nucleus.utils.staging import explain_write_error, find_os_error, fsync_folder

log = logging.getLogger(__name__)

_FILE_BYTES = 2 << 30  # the writer builds each file in memory before it writes it
_OWN_KEYS = ("format", "step", "samples_seen", "skipped", "optimizer")


class Checkpointer:
    """Checkpoints of one run.

    Works with and without an initialised process group. With one, every rank calls `save` and `load_latest` at
    the same step; each writes its own pieces, rank 0 writes everything else. Messages per save: two barriers.

    Args:
        folder: ``RUN/checkpoints``; created by the first save.
        keep_last: after a save, delete step folders older than the newest this many, counted back from the one that
            ``latest`` names (later ones, of a run that went back, are left alone); None keeps all. Merging N
            checkpoints needs at least N.
        checksums: compare SHA-256 on load (one extra read); sizes are always compared.
    """

    def __init__(self, folder: str | Path, keep_last: int | None = None, checksums: bool = True):
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"--keep-last-checkpoints {keep_last}: must be at least 1, or none to keep all")
        self.folder, self.keep_last, self.checksums = Path(folder), keep_last, checksums

    def save(self, state: TrainState, extra: dict) -> Path:
        """Write ``state`` as ``step_x`` and point ``latest`` at it.

        Args:
            state: model, and an optimizer with ``tensors()`` and ``scalars()``.
            extra: the other entries of state.json (JSON values): seed, model, codec, text_encoder, sampling,
                data, git_commit, versions.

        Returns:
            the step folder.

        Raises:
            ConfigError: the folder cannot be written. DataError: the disk is full. In both cases the previous
            checkpoint stays as it was.
        """
        for key in _OWN_KEYS:
            if key in extra:
                raise ValueError(f"extra must not hold '{key}': the checkpointer writes it")
        target = self.folder / native.step_name(state.step)
        staging = self.folder / f".tmp_{target.name}"
        keeps = "checkpoints written before stay usable"
        try:
            self._write(state, extra, staging, target)
        except (Exception, dcp.api.CheckpointException) as error:
            cause = find_os_error(error)
            if _rank() == 0:
                shutil.rmtree(staging, ignore_errors=True)
            if cause is None:
                raise
            raise explain_write_error(cause, target, keeps) from error
        return target

    def load_latest(self, state: TrainState) -> dict | None:
        """Fill ``state`` in place from the checkpoint that ``latest`` names.

        Returns:
            ``extra`` as it was given to `save`, or None when there is no checkpoint yet (``state`` is untouched).

        Raises:
            ConfigError: the checkpoint holds another architecture or other optimizer state than ``state``.
            DataError: it is damaged; the message names the file, the newest older complete checkpoint and how to
                resume from that one. Nothing is loaded then.
        """
        if native.checkpoints_folder(self.folder) != self.folder:
            return None
        step = self._guarded(lambda: native.newest_checkpoint(self.folder), self.folder)
        if not (self.folder / "latest").is_file():  # killed between the first rename and the first `latest`
            log.warning(
                "%s is missing; resuming from %s, the newest complete checkpoint",
                self.folder / "latest",
                step,
            )
        stored = self._guarded(lambda: self._read_verified(step), step)
        _check_architecture(stored, state.model, step)
        parts = {"model": state.model.state_dict(), "optimizer": state.optimizer.tensors()}
        for part, tensors in parts.items():
            _check_tensors(step, part, tensors)
        for part, tensors in parts.items():
            _dcp_load(tensors, step / part)
        state.optimizer.load_scalars(stored["optimizer"])
        state.step, state.samples_seen = stored["step"], stored["samples_seen"]
        state.skipped = stored["skipped"]
        return {k: v for k, v in stored.items() if k not in _OWN_KEYS}

    def _write(self, state: TrainState, extra: dict, staging: Path, target: Path) -> None:
        if _rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*self.folder.glob(".tmp_step_*"), *self.folder.glob(".old_step_*")):
                shutil.rmtree(leftover)
            for part in ("model", "optimizer"):
                (staging / part).mkdir(parents=True)
        _barrier()
        _dcp_save(state.model.state_dict(), staging / "model")
        _dcp_save(state.optimizer.tensors(), staging / "optimizer")
        _barrier()
        if _rank() == 0:
            self._finish(state, extra, staging, target)
        _barrier()

    def _finish(self, state: TrainState, extra: dict, staging: Path, target: Path) -> None:
        """Rank 0: describe the shards, make them durable, give them their name."""
        own = {
            "format": native.FORMAT,
            "step": state.step,
            "samples_seen": state.samples_seen,
            "skipped": state.skipped,
            "optimizer": state.optimizer.scalars(),
        }
        write_json_atomic(staging / "state.json", {**own, **extra})
        native.write_manifest(staging, native.describe_files(staging))
        for folder in (staging / "model", staging / "optimizer", staging):
            fsync_folder(folder)
        if (
            target.exists()
        ):  # saved before by a run that went back to an older checkpoint: `latest` names another
            os.rename(target, self.folder / f".old_{target.name}")
        os.rename(staging, target)
        fsync_folder(self.folder)
        native.set_latest(self.folder, target)
        fsync_folder(self.folder)
        shutil.rmtree(self.folder / f".old_{target.name}", ignore_errors=True)
        self._prune()

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        for step in native.list_branch(self.folder)[: -self.keep_last]:
            # A half-deleted folder must not look like a checkpoint.
            hidden = self.folder / f".old_{step.name}"
            os.rename(step, hidden)
            shutil.rmtree(hidden)

    def _read_verified(self, step: Path) -> dict:
        native.verify(step, checksums=self.checksums)
        stored = native.read_state(step)
        for key in _OWN_KEYS:
            if key not in stored:
                raise DataError(f"{step / 'state.json'}: has no '{key}', so training cannot resume from it")
        return stored

    def _guarded(self, action: Callable, damaged: Path):
        """Run ``action``; add to a DataError which checkpoint to go back to, and how."""
        try:
            return action()
        except DataError as error:
            other = native.find_complete(damaged)
            if other is None:
                raise DataError(
                    f"{error}; no other complete checkpoint is in {self.folder}: restore the file, or start again "
                    "in a new run folder"
                ) from error
            raise DataError(
                f"{error}; {other} is complete: to resume from it, run: echo {other.name} > {self.folder / 'latest'}"
            ) from error


def _check_architecture(stored: dict, model: torch.nn.Module, step: Path) -> None:
    shape, saved = getattr(model, "shape", None), stored.get("model")
    if shape is None or not isinstance(saved, dict):
        return
    ours = native.shape_to_dict(shape)
    for key in sorted(ours.keys() | saved.keys()):
        if ours.get(key) != saved.get(key):
            raise ConfigError(
                f"model.{key}: {ours.get(key)} is configured, but {step} was trained with {saved.get(key)}; "
                "restore that value or choose another --run-dir"
            )


def _check_tensors(step: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Names, shapes and dtypes must agree before anything is overwritten."""
    store = native.open_tensors(step, part)
    for name in [*tensors, *store.names()]:
        if name not in store or name not in tensors:
            owner = "this run" if name in tensors else "the checkpoint"
            raise ConfigError(
                f"{step / part}: {part} tensor {name} exists only in {owner}; use the model and optimizer settings "
                "the checkpoint was written with, or another --run-dir"
            )
        ours = TensorInfo(tuple(tensors[name].shape), tensors[name].dtype)
        if store.info(name) != ours:
            theirs = store.info(name)
            raise ConfigError(
                f"{step / part}: {part} tensor {name} is {list(theirs.shape)} {theirs.dtype}, this run needs "
                f"{list(ours.shape)} {ours.dtype}; use the settings it was written with, or another --run-dir"
            )


def _dcp_save(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors as safetensors, every rank its own pieces; no pickle and no metadata file."""
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    shards = assign_shards(infos, _FILE_BYTES)
    mapping = {name: i for i, shard in enumerate(shards, start=1) for name in shard}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=mapping, save_distributed=True)
    values = {name: t.detach().contiguous() for name, t in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        dcp.save(values, storage_writer=writer, no_dist=not _distributed())


def _dcp_load(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors in place from safetensors that any number of ranks wrote."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
        )
        values = {name: t.detach() for name, t in tensors.items()}
        dcp.load(values, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not _distributed())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _barrier() -> None:
    if _distributed():
        dist.barrier()
