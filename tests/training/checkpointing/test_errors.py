"""Errors of one rank, of a disk, of a damaged file: all ranks raise the same, or go on the same way."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_nucleus.export import native
from megatron_nucleus.training.checkpointing import checkpointer, shard_files, step_folders
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.types import TrainState
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.ranks import run_ranks
from tests.training.checkpointing.sharded_state import EXTRA, assert_holds, build, fill, grid


class Unpicklable(Exception):
    """Some libraries raise such exceptions."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")


def raising(error: Exception) -> Callable:
    def fail(*args, **kwargs):
        raise error

    return fail


SAVE_FAULTS = {  # (rank, module, name of the function that fails there, its error)
    "disk full on one rank": (1, shard_files, "_settle", OSError(errno.ENOSPC, "No space left on device")),
    "quota on all ranks": (None, shard_files, "_settle", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "input/output error": (1, shard_files, "_settle", OSError(errno.EIO, "Input/output error")),
    "read-only on one node": (
        1,
        shard_files.dcp.HuggingFaceStorageWriter,
        "prepare_local_plan",
        OSError(errno.EROFS, "Read-only file system"),
    ),
    "a bug": (1, shard_files, "_settle", Unpicklable("of a library")),
    "folder": (0, checkpointer, "clear_leftovers", OSError(errno.EROFS, "Read-only file system")),
    "manifest": (0, native, "write_manifest", OSError(errno.ENOSPC, "No space left on device")),
    "rename": (0, step_folders.os, "rename", OSError(errno.EACCES, "Permission denied")),
    "latest": (0, native, "set_latest", OSError(errno.EIO, "Input/output error")),
}
SAVE_ERRORS = {
    "disk full on one rank": (DataError, r"\(No space left on device\); free .* sees \d+ bytes .*\(rank 1 of 2\)"),
    "quota on all ranks": (DataError, r"\(Disk quota exceeded\).*\(rank 0 of 2, and 1 more\)"),
    "input/output error": (DataError, r"\(Input/output error, on .*check the file system.*usable \(rank 1 of 2\)"),
    "read-only on one node": (ConfigError, r"\(Read-only file system\).*seen on .*\(rank 1 of 2\)"),
    "a bug": (RuntimeError, r"Unpicklable: of a library.*\(rank 1 of 2\)"),
    "folder": (ConfigError, r"\(Read-only file system\); choose a folder that can be written.*stay usable"),
    "manifest": (DataError, r"\(No space left on device\)"),
    "rename": (ConfigError, r"\(Permission denied\)"),
    "latest": (DataError, r"\(Input/output error"),
}  # fmt: skip


def save_now(saver: Checkpointer, state: TrainState) -> None:
    saver.save(state, EXTRA)
    saver.wait()


def save_with_faults(folder: Path, asynchronous: bool) -> list[tuple[type, str]]:
    """Each fault once, on its rank; all ranks must get on."""
    ps = grid(ep=2)
    state = build(ps)
    saver = Checkpointer(folder, control=ps.control, asynchronous=asynchronous)
    save_now(saver, fill(state, ps, 1))
    caught = []
    for where, module, name, error in SAVE_FAULTS.values():
        good = getattr(module, name)
        if where in (None, ps.rank):
            setattr(module, name, raising(error))
        with pytest.raises((DataError, ConfigError, RuntimeError)) as raised:
            save_now(saver, fill(state, ps, 2))
        setattr(module, name, good)
        dist.barrier()
        caught.append((raised.type, str(raised.value)))
        assert (folder / "latest").read_text() == "step_00000001\n"
        assert saver.load_latest(fill(state, ps, 5)) == EXTRA
        assert_holds(state, ps, 1)
    save_now(saver, fill(state, ps, 2))
    saver.load_latest(fill(state, ps, 5))
    assert_holds(state, ps, 2)
    return caught


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_fails_on_one_rank_is_the_same_error_on_all(tmp_path, asynchronous):
    first, second = run_ranks(2, save_with_faults, tmp_path, tmp_path / "c", asynchronous, timeout_s=60)
    assert first == second
    for name, (kind, message) in zip(SAVE_FAULTS, first, strict=True):
        expected, pattern = SAVE_ERRORS[name]
        assert kind is expected, (name, message)
        assert re.search(pattern, message, re.DOTALL), (name, message)
        assert kind is RuntimeError or str(tmp_path / "c" / "step_00000002") in message
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["latest", "step_00000001", "step_00000002"]


def fail_to_copy(folder: Path) -> str:
    ps = grid()
    state = build(ps)
    saver = Checkpointer(folder, control=ps.control, asynchronous=True)
    if ps.rank == 1:
        checkpointer.copy_to_host = raising(RuntimeError("can't allocate memory"))
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        saver.save(fill(state, ps, 1), EXTRA)
    saver.wait()
    return str(caught.value)


def test_too_little_host_memory_on_one_rank(tmp_path):
    first, second = run_ranks(2, fail_to_copy, tmp_path, tmp_path / "c")
    assert first == second
    assert not (tmp_path / "c").exists()


class Warnings(logging.Handler):
    """What this rank warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        logging.getLogger(checkpointer.__name__).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def load_damaged(folder: Path, fault: str) -> tuple[list[str], int | None, str]:
    """What is warned of, the step that is loaded, the error."""
    ps = grid(ep=2)
    state, saver, heard = fill(build(ps), ps, 9), Checkpointer(folder, control=ps.control), Warnings()
    if fault == "seen by one rank" and ps.rank == 1:
        hashed = native.sha256_file
        native.sha256_file = lambda path: "" if "step_00000003" in str(path) else hashed(path)
    if fault == "read error" and ps.rank == 1:
        read = shard_files.dcp.HuggingFaceStorageReader.read_data

        def fail(self, plan, planner):
            if "step_00000003" in str(self.path):
                raise OSError(errno.EIO, "Input/output error")
            return read(self, plan, planner)

        shard_files.dcp.HuggingFaceStorageReader.read_data = fail
    if fault == "headers" and ps.rank == 1:
        headers = shard_files.dcp.HuggingFaceStorageReader.read_metadata
        shard_files.dcp.HuggingFaceStorageReader.read_metadata = lambda self: (
            headers(self) if "step_00000003" not in str(self.path) else raising(OSError(errno.EIO, "gone"))()
        )
    try:
        saver.load_latest(state)
    except (DataError, ConfigError) as error:
        return heard.said, None, f"{type(error).__name__}: {error}"
    assert_holds(state, ps, state.step)
    return heard.said, state.step, ""


@pytest.fixture
def three_steps(tmp_path):
    folder = tmp_path / "c"
    ps = grid()
    for step in (1, 2, 3):
        Checkpointer(folder).save(fill(build(ps), ps, step), EXTRA)
    return folder


@pytest.mark.parametrize("fault", ["seen by one rank", "read error", "headers", "on disk", "latest"])
def test_a_damaged_newest_is_named_and_all_ranks_take_the_one_before(tmp_path, three_steps, fault):
    if fault == "on disk":
        (file,) = (three_steps / "step_00000003" / "optimizer").iterdir()
        file.write_bytes(file.read_bytes()[:-1])
    if fault == "latest":
        (three_steps / "latest").write_bytes(b"\xff\x00garbage")
    (said, step, _), (quiet, other, _) = run_ranks(2, load_damaged, tmp_path, three_steps, fault)
    assert step == other == (3 if fault == "latest" else 2)
    assert quiet == []  # one rank speaks for all
    assert str(three_steps / ("latest" if fault == "latest" else "step_00000003")) in said[0]
    assert said[-1] == f"resuming from {three_steps / f'step_0000000{step}'}, which is complete"


def test_nothing_complete_is_one_error_on_all_ranks(tmp_path, three_steps):
    for step in native.list_steps(three_steps):
        (step / "state.json").unlink()
    (_, _, first), (_, _, second) = run_ranks(2, load_damaged, tmp_path, three_steps, "")
    assert first == second
    assert re.match(rf"DataError: {three_steps}/step_00000003/state.json: missing.*no other complete", first)


def test_other_settings_are_refused_on_all_ranks_and_touch_nothing(tmp_path, three_steps):
    first, second = run_ranks(2, load_other_settings, tmp_path, three_steps)
    assert first == second
    assert re.match(
        r"optimizer tensor momentum\.bias exists only in the checkpoint", first.split("optimizer: ")[1]
    )


def load_other_settings(folder: Path) -> str:
    ps = grid()
    state = fill(build(ps), ps, 9)
    kept = state.optimizer.state.pop("momentum.bias")
    with pytest.raises(ConfigError) as caught:
        Checkpointer(folder, control=ps.control).load_latest(state)
    state.optimizer.state["momentum.bias"] = kept
    assert_holds(state, ps, 9)
    return str(caught.value)


# ---- real file systems that fail


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(folder: Path, ballast: Path, asynchronous: bool) -> tuple[int, str]:
    """Save until the disk is full, make room, save again; returns the step that failed, and how."""
    ps = grid(ep=2)
    state = build(ps)
    saver = Checkpointer(folder, control=ps.control, asynchronous=asynchronous)
    for step in range(1, 1000):
        try:
            save_now(saver, fill(state, ps, step))
        except DataError as error:
            message = str(error)
            break
    saver.load_latest(fill(state, ps, 0))
    assert_holds(state, ps, step - 1)
    if ps.rank == 0:
        ballast.unlink()
    dist.barrier()
    save_now(saver, fill(state, ps, step))
    saver.load_latest(fill(state, ps, 0))
    assert_holds(state, ps, step)
    return step, message


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_really_full(tmp_path, small_disk, asynchronous):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 800_000)
    results = run_ranks(2, fill_disk, tmp_path, small_disk / "c", ballast, asynchronous)
    assert results[0] == results[1]
    step, message = results[0]
    assert step > 1
    assert f"step_{step:08d}: cannot be written (No space left on device); free some space" in message
    assert re.search(r"sees \d+ bytes free there; checkpoints written before stay usable", message)
    assert not list((small_disk / "c").glob(".*"))


def save_read_only(folder: Path) -> str:
    ps = grid()
    state, saver = build(ps), Checkpointer(folder / "c", control=ps.control)
    saver.save(fill(state, ps, 1), EXTRA)
    if ps.rank == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    dist.barrier()
    with pytest.raises(ConfigError) as caught:
        saver.save(fill(state, ps, 2), EXTRA)
    saver.load_latest(fill(state, ps, 0))
    assert_holds(state, ps, 1)
    return str(caught.value)


def test_a_file_system_that_turned_read_only(tmp_path, small_disk):
    first, second = run_ranks(2, save_read_only, tmp_path, small_disk)
    assert first == second
    assert "step_00000002: cannot be written (Read-only file system)" in first


def test_several_ranks_without_a_control_group_are_refused(tmp_path):
    assert run_ranks(2, no_control_group, tmp_path, tmp_path / "c") == [True, True]


def no_control_group(folder: Path) -> bool:
    with pytest.raises(ValueError, match="control group"):
        Checkpointer(folder)
    return not os.path.exists(folder)
