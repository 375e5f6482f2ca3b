"""Save and resume a run: complete checkpoints or none, whatever dies in between, over any number of ranks.

Layout: `export/native.py`. Order of a save: all ranks write their pieces into ``.tmp_step_x``, fsync and hash them;
rank 0 checks from the files that no element of model and optimizer is missing, writes the manifest, renames the
folder to ``step_x`` and only then replaces ``latest`` (`step_folders.py`). A kill at any point leaves the previous
checkpoint, or both.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nucleus.export import native
from megatron_nucleus.export.coverage import check_complete, read_layout
from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.training.checkpointing.agreement import Ranks
from megatron_nucleus.training.checkpointing.async_save import Background, copy_to_host
from megatron_nucleus.training.checkpointing.shard_files import (
    contiguous,
    explained,
    read_tensors,
    write_tensors,
)
from megatron_nucleus.training.checkpointing.step_folders import (
    clear_leftovers,
    is_whole,
    prune,
    publish,
    settle_replaced,
    staging_folder,
    weights_alone,
)
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import write_json_atomic

log = logging.getLogger(__name__)

_PARTS = ("model", "optimizer")
_NEEDED_KEYS = ("format", "step", "samples_seen", "skipped", "optimizer")
_OWN_KEYS = (*_NEEDED_KEYS, "loss_average")
# A change of precision would change the run that is resumed; a new one may take over its weights.
_PRECISION = (
    " (--master-weights and --state-dtype choose dtypes; to change them, start a new run with --init-from, which "
    "converts the weights)"
)
_GRACE_S = 60.0  # for a pending save when the run ends with an error: its other ranks may be gone


@dataclasses.dataclass
class _Snapshot:
    """What one save writes. document: state.json. parts: ``model`` and ``optimizer`` tensors by name."""

    target: Path
    document: dict
    parts: dict[str, dict[str, Tensor]]


class Checkpointer:
    """Checkpoints of one run. Every rank calls every method, in the same order and at the same step.

    Whatever fails on one rank raises the same error on all of them. Use it as a context manager, or call `wait`
    before the program ends: a pending save is then finished. After an error it gets a minute to end, then it is
    dropped, as after kill -9. Without either it is finished before the interpreter exits.

    Args:
        folder: ``RUN/checkpoints``, on a file system that all ranks share; created by the first save.
        keep_last: after a save, delete step folders older than the newest this many, counted back from the one that
            ``latest`` names (later ones, of a run that went back, are left alone); None keeps all. A checkpoint
            that `load_latest` found damaged counts as none.
        keep_last_weights: of the older folders keep the newest this many, without their optimizer state (at half
            the size with Muon, a third with AdamW): to merge, to sample, to start a new run, not to resume. None
            deletes them all. Merging N checkpoints needs ``keep_last`` + ``keep_last_weights`` of at least N.
        checksums: compare SHA-256 on load (one extra read, shared among the ranks); sizes are always compared.
        control: gloo group over all ranks; None for one process.
        asynchronous: `save` copies the state to host memory and returns; a thread writes the copy while training
            goes on, and talks over a process group of its own. Costs one copy of this rank's part of the state.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int | None = None,
        keep_last_weights: int | None = None,
        checksums: bool = True,
        control: dist.ProcessGroup | None = None,
        asynchronous: bool = False,
    ):
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"--keep-last-checkpoints {keep_last}: must be at least 1, or none to keep all")
        if keep_last_weights is not None and keep_last is None:
            raise ConfigError(
                f"--keep-last-weights {keep_last_weights}: is for checkpoints older than --keep-last-checkpoints N, "
                "which keeps all now; give N as well"
            )
        if keep_last_weights is not None and keep_last_weights < 1:
            raise ConfigError(
                f"--keep-last-weights {keep_last_weights}: must be at least 1, or none to keep none"
            )
        if control is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("several ranks need a control group: each would save alone")
        self.folder, self.checksums = Path(folder), checksums
        self.keep_last, self.keep_last_weights = keep_last, keep_last_weights
        self._control = Ranks(control)
        # Collectives of two threads in one group would mix. A slow write is waited for as long as gloo does (30 min).
        self._writers = Ranks(dist.new_group(backend="gloo") if asynchronous and control else control)
        self._background = Background() if asynchronous else None
        self._damaged: set[str] = set()
        # Said by every dcp call without a process group; a filter set around each call would race with the thread.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

    def save(self, state: TrainState, extra: dict) -> Path:
        """Write ``state`` as ``step_x`` and point ``latest`` at it.

        With ``asynchronous`` the state may change as soon as this returns; `wait`, or the next save, raises what went
        wrong. A save waits for the pending one; if that one failed, it raises its error and writes nothing itself.

        Args:
            state: model, and an optimizer with ``tensors()`` and ``scalars()``.
            extra: the other entries of state.json (JSON values): seed, model, codec, text_encoder, sampling,
                data, git_commit, versions.

        Returns:
            the step folder.

        Raises:
            ConfigError: the folder cannot be written. DataError: the disk is full, the file system failed, or not
                everything arrived in the files. Checkpoints written before stay as they were, ``latest`` too.
        """
        for key in _OWN_KEYS:
            if key in extra:
                raise ValueError(f"extra must not hold '{key}': the checkpointer writes it")
        self.wait()
        taken: list[_Snapshot] = []
        self._control.on_all(lambda: taken.append(self._take(state, extra)))  # memory may run out
        (snapshot,) = taken
        if self._background is None:
            self._write(snapshot)
        else:
            self._background.start(lambda: self._write_in_background(snapshot))
        return snapshot.target

    def wait(self) -> None:
        """Return when no save is pending on any rank; raises the error of a pending save that failed."""
        if self._background is not None:
            self._background.wait()

    def load_latest(self, state: TrainState) -> dict | None:
        """Fill ``state`` in place from the newest complete checkpoint: the one that ``latest`` names, or, with a
        warning that names what is damaged, the newest complete one before it.

        Newer ones, of a run that went back, are not tried. Only where ``latest`` itself is missing or damaged is
        the newest of all complete ones taken. A checkpoint loads into any number of ranks and any layout. Folders
        that were kept for their weights are passed over.

        Returns:
            ``extra`` as it was given to `save`, or None when there is no checkpoint yet (``state`` is untouched).

        Raises:
            ConfigError: the checkpoint holds another architecture or other optimizer state than ``state``, which
                is untouched; or ``latest`` names a folder with weights alone.
            DataError: none is complete; the message names what is wrong with the newest.
        """
        self.wait()
        found = self._control.on_first(self._find)
        if found is None:
            return None
        steps, damage = found
        problems = [damage] if damage else []
        if damage:
            self._warn(f"{damage}; looking for the newest complete checkpoint")
        for step in steps:
            try:
                if not self._control.on_first(lambda step=step: native.holds_optimizer(step)):
                    if not problems:
                        raise ConfigError(f"{self.folder / 'latest'}: names {weights_alone(step)}")
                    continue
                stored = self._load(step, state)
            except DataError as error:
                self._warn(f"skipping a damaged checkpoint: {error}")
                self._damaged.add(step.name)
                problems.append(str(error))
                continue
            if problems:
                self._warn(f"resuming from {step}, which is complete")
            return {key: value for key, value in stored.items() if key not in _OWN_KEYS}
        raise self._control.on_first(lambda: self._nothing_complete(steps, problems))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._background is not None:
            try:
                if not self._background.wait(_GRACE_S):
                    log.warning("dropped the pending save: it had not ended after %.0f s", _GRACE_S)
            except Exception as failure:
                log.warning("the pending save failed: %s", failure)

    # ---- saving

    def _take(self, state: TrainState, extra: dict) -> _Snapshot:
        """What to write; for a save in the background it shares no memory with ``state``."""
        own = {
            "format": native.FORMAT,
            "step": state.step,
            "samples_seen": state.samples_seen,
            "skipped": state.skipped,
            "loss_average": state.loss_average,
            "optimizer": state.optimizer.scalars(),
        }
        keep = contiguous if self._background is None else copy_to_host
        parts = {part: keep(tensors) for part, tensors in _tensors(state).items()}
        target = self.folder / native.step_name(state.step)
        return _Snapshot(target, copy.deepcopy({**own, **extra}), parts)

    def _write_in_background(self, snapshot: _Snapshot) -> None:
        try:
            self._write(snapshot)
        except Exception as error:  # the next save may be hours away
            self._warn(f"a save in the background failed: {error}")
            raise

    def _write(self, snapshot: _Snapshot) -> None:
        started, ranks, staging = time.perf_counter(), self._writers, staging_folder(snapshot.target)
        try:
            self._first_saves(snapshot, lambda: self._prepare(staging))
            files: dict[str, dict] = {}
            for part, tensors in snapshot.parts.items():
                written = write_tensors(ranks, tensors, staging / part, snapshot.target)
                files |= {f"{part}/{name}": entry for name, entry in written.items()}
            self._first_saves(snapshot, lambda: self._finish(snapshot, files))
        except Exception:
            if ranks.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
                settle_replaced(self.folder)
            raise
        if ranks.rank == 0:
            log.info("saved %s in %.1f s", snapshot.target, time.perf_counter() - started)

    def _first_saves(self, snapshot: _Snapshot, action: Callable[[], None]) -> None:
        def run() -> None:
            with explained(snapshot.target):
                action()

        self._writers.on_first(run)

    def _prepare(self, staging: Path) -> None:
        """Rank 0: make room for a save."""
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.folder)
        for part in _PARTS:
            (staging / part).mkdir(parents=True)

    def _finish(self, snapshot: _Snapshot, files: dict[str, dict]) -> None:
        """Rank 0: check and describe what is there, then let it count."""
        target, staging = snapshot.target, staging_folder(snapshot.target)
        for part, tensors in snapshot.parts.items():
            # By name: listing a folder may miss what other hosts have just put there.
            there = [staging / name for name in files if name.startswith(f"{part}/")]
            _check_written(target, [path for path in there if path.is_file()], part, tensors)
        write_json_atomic(staging / "state.json", snapshot.document)
        files["state.json"] = native.describe_file(staging / "state.json")
        native.write_manifest(staging, files)
        publish(target)
        self._damaged.discard(target.name)
        if self.keep_last is not None:
            prune(self.folder, self.keep_last, self.keep_last_weights, self._damaged)

    # ---- loading

    def _find(self) -> tuple[list[Path], str | None] | None:
        """Rank 0: checkpoints in the order in which to try them and what is wrong with ``latest``; None: none yet."""
        try:
            settle_replaced(self.folder)
            if native.checkpoints_folder(self.folder) != self.folder:
                return None
            return native.resume_order(self.folder)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be read ({error.strerror})") from error

    def _load(self, step: Path, state: TrainState) -> dict:
        """state.json of a checkpoint, with everything in ``state``; DataError when it is damaged."""
        stored = self._read_verified(step)
        _check_architecture(stored, state.model, step)
        parts = _tensors(state)
        for part, tensors in parts.items():
            self._control.on_first(lambda part=part, tensors=tensors: check_stored(step, part, tensors))
        for part, tensors in parts.items():
            read_tensors(self._control, tensors, step / part)
        state.optimizer.load_scalars(stored["optimizer"])
        state.step, state.samples_seen = stored["step"], stored["samples_seen"]
        state.skipped, state.loss_average = stored["skipped"], stored.get("loss_average")
        return stored

    def _read_verified(self, step: Path) -> dict:
        ranks = self._control
        listed = ranks.on_first(lambda: native.listed_files(step))
        by_size = sorted(listed, key=lambda name: (-listed[name]["bytes"], name))
        share = {name: listed[name] for name in by_size[ranks.rank :: ranks.world]}
        ranks.on_all(lambda: native.check_files(step, share, self.checksums))
        stored = ranks.on_first(lambda: native.read_state(step))
        for key in _NEEDED_KEYS:
            if key not in stored:
                raise DataError(f"{step / 'state.json'}: has no '{key}', so training cannot resume from it")
        return stored

    def _nothing_complete(self, tried: list[Path], problems: list[str]) -> DataError:
        problem = "; ".join(problems[:2])  # `latest` or the newest, and the next
        newer = [step for step in native.list_steps(self.folder) if step not in tried]
        whole = next((step for step in reversed(newer) if is_whole(step) and native.is_complete(step)), None)
        if whole is not None:
            return DataError(
                f"{problem}; {whole}, which the run had left behind, is complete: to resume from it, give the same "
                f"command once with --set-latest {native.step_number(whole)}, then again without"
            )
        weights = [
            step for step in (*reversed(newer), *tried) if not is_whole(step) and native.is_complete(step)
        ]
        if weights:
            return DataError(f"{problem}; what is complete is {weights_alone(weights[0])}")
        return DataError(
            f"{problem}; no other complete checkpoint is in {self.folder}: restore the file, or start again in a "
            "new run folder"
        )

    def _warn(self, message: str) -> None:
        if self._control.rank == 0:
            log.warning("%s", message)


def _tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    return {"model": state.model.state_dict(), "optimizer": state.optimizer.tensors()}


def _infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    """Global shapes and dtypes."""
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _check_written(target: Path, files: list[Path], part: str, tensors: dict[str, Tensor]) -> None:
    """Every element of every tensor must be in the files, once: those of all ranks, all experts."""
    try:
        check_complete(read_layout(files), _infos(tensors))
    except DataError as error:
        raise DataError(
            f"{target}: not everything that the ranks wrote is there: {part} {error}; does every rank reach this "
            "folder? Checkpoints written before stay usable"
        ) from error


def _check_architecture(stored: dict, model: torch.nn.Module, step: Path) -> None:
    shape, saved = getattr(model, "shape", None), stored.get("model")
    if shape is None or not isinstance(saved, dict):
        return
    ours = native.shape_to_dict(shape)
    saved = native.shape_to_dict(native.shape_from_dict(saved, step / "state.json"))
    for key in sorted(ours.keys() | saved.keys()):
        if ours.get(key) != saved.get(key):
            raise ConfigError(
                f"model.{key}: {ours.get(key)} is configured, but {step} was trained with {saved.get(key)}; "
                "restore that value or choose another --run-dir"
            )


def check_stored(step: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Names, shapes and dtypes must agree before anything is overwritten; DataError when pieces are missing."""
    layout = read_layout(native.part_files(step, part))
    theirs, ours = {name: stored.info for name, stored in layout.items()}, _infos(tensors)
    check_complete(layout, theirs)
    for name in [*ours, *theirs]:
        if name not in theirs or name not in ours:
            owner = "this run" if name in ours else "the checkpoint"
            raise ConfigError(
                f"{step / part}: {part} tensor {name} exists only in {owner}; use the model and optimizer settings "
                f"the checkpoint was written with, or another --run-dir{_PRECISION * (part == 'optimizer')}"
            )
        if theirs[name] != ours[name]:
            raise ConfigError(
                f"{step / part}: {part} tensor {name} is {list(theirs[name].shape)} {theirs[name].dtype}, this run "
                f"needs {list(ours[name].shape)} {ours[name].dtype}; use the settings it was written with, or "
                f"another --run-dir{_PRECISION * (theirs[name].dtype != ours[name].dtype)}"
            )
