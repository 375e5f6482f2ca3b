"""Processes that are killed (SIGKILL) while they save: what was complete stays complete, and the next run goes on."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import random
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_nucleus.export import native
from megatron_nucleus.training.checkpointing import checkpointer, shard_files, step_folders
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from tests.training.checkpointing.sharded_state import (
    EXTRA,
    assert_holds,
    assert_weights_stored,
    build,
    fill,
    grid,
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks_preload"])


class Group:
    """Processes that run ``function(rank, world, meeting, report, *args)``; none is left behind.

    They meet in ``folder``; rank 0 alone has something to report.
    """

    def __init__(self, world: int, folder: Path, function: Callable, *args: object):
        meeting = folder / f"meeting_{uuid.uuid4().hex}"
        self.reader, writer = CONTEXT.Pipe(duplex=False)
        self.processes = [
            CONTEXT.Process(
                target=function, args=(rank, world, meeting, writer if rank == 0 else None, *args)
            )
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()
        writer.close()

    def wait_for_word(self) -> int:
        assert self.reader.poll(60), "no sign of life"
        return self.reader.recv()

    def last_word(self) -> int | None:
        """The last of what was reported before the end."""
        word = None
        try:
            while self.reader.poll(5):
                word = self.reader.recv()
        except EOFError:
            return word
        raise AssertionError("the process does not end")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def assert_resumes(folder: Path, values: int, step: int | None = None) -> None:
    """The newest complete checkpoint has the values of ``values``; the next save works and cleans up."""
    ps = grid()
    state, saver = build(ps), Checkpointer(folder, keep_last=2, keep_last_weights=2)
    assert saver.load_latest(state) == EXTRA
    assert state.step == (values if step is None else step)
    state.step = values
    assert_holds(state, ps, values)
    saver.save(fill(state, ps, 3), EXTRA)
    assert hidden(folder) == []
    saver.load_latest(fill(state, ps, 9))
    assert_holds(state, ps, 3)


# ---- at every stage of a save


def save_until(rank: int, world: int, meeting: Path, report: Connection, stage: str, folder: Path) -> None:
    """Steps 1 and 2 are saved; the save of step 3, or of step 2 again, stops at ``stage``."""
    ps = grid()
    keep_last_weights = 2 if stage.startswith("weights") else None
    state, saver = build(ps), Checkpointer(folder, keep_last=2, keep_last_weights=keep_last_weights)
    for step in (1, 2):
        saver.save(fill(state, ps, step), EXTRA)

    def stop(*args: object) -> None:
        report.send(0)
        time.sleep(60)

    write, rename, renamed = checkpointer.write_tensors, os.rename, []
    write_manifest, described = native.write_manifest, []

    def write_model_only(ranks, tensors, folder, target):
        return stop() if folder.name == "optimizer" else write(ranks, tensors, folder, target)

    def rename_once(*args: Path) -> None:
        renamed.append(args)
        stop() if len(renamed) == 2 else rename(*args)

    def describe_once(*args: object) -> None:
        described.append(args)
        stop() if len(described) == 2 else write_manifest(*args)

    module, name, action = {
        "shards": (checkpointer, "write_tensors", write_model_only),
        "check": (checkpointer, "_check_written", stop),
        "manifest": (native, "write_manifest", stop),
        "rename": (step_folders.os, "rename", stop),
        "latest": (native, "set_latest", stop),
        "prune": (step_folders.shutil, "rmtree", stop),
        "between renames": (step_folders.os, "rename", rename_once),
        "replaced": (native, "set_latest", stop),
        "removal": (step_folders.shutil, "rmtree", stop),
        "weights: manifest": (native, "write_manifest", describe_once),
        "weights: files": (step_folders.os, "rename", rename_once),
        "weights: removal": (step_folders.shutil, "rmtree", stop),
    }[stage]
    setattr(module, name, action)
    again = stage in ("between renames", "replaced", "removal")
    fill(state, ps, 7 if again else 3)
    state.step = 2 if again else 3
    saver.save(state, EXTRA)


STAGES = {  # what is left beside `latest`, the values that are loaded, their step
    "shards": ({".tmp_step_00000003", "step_00000001", "step_00000002"}, 2, 2),
    "check": ({".tmp_step_00000003", "step_00000001", "step_00000002"}, 2, 2),
    "manifest": ({".tmp_step_00000003", "step_00000001", "step_00000002"}, 2, 2),
    "rename": ({".tmp_step_00000003", "step_00000001", "step_00000002"}, 2, 2),
    "latest": ({"step_00000001", "step_00000002", "step_00000003"}, 2, 2),
    "prune": ({".old_step_00000001", "step_00000002", "step_00000003"}, 3, 3),
    "between renames": ({".replaced_step_00000002", ".tmp_step_00000002", "step_00000001"}, 2, 2),
    "replaced": ({".replaced_step_00000002", "step_00000001", "step_00000002"}, 7, 2),
    "removal": ({".replaced_step_00000002", "step_00000001", "step_00000002"}, 7, 2),
}


def test_a_kill_at_any_stage_leaves_the_newest_complete_checkpoint(tmp_path):
    for stage, (left, values, step) in STAGES.items():
        folder = tmp_path / stage
        with Group(1, tmp_path, save_until, stage, folder) as group:
            group.wait_for_word()
            group.kill()
        assert {p.name for p in folder.iterdir()} - {"latest"} == left, stage
        assert_resumes(folder, values, step)


@pytest.mark.parametrize(
    ("stage", "left", "whole"),
    [
        ("manifest", set(), True),
        ("files", set(), False),
        ("removal", {".old_step_00000001_optimizer"}, False),
    ],
)
def test_a_kill_while_optimizer_state_is_dropped_leaves_every_checkpoint_complete(
    tmp_path, stage, left, whole
):
    """Steps 1 to 3 were saved; step 1 is being cut down to its weights."""
    folder = tmp_path / "c"
    with Group(1, tmp_path, save_until, f"weights: {stage}", folder) as group:
        group.wait_for_word()
        group.kill()
    first, *others = native.list_steps(folder)
    assert set(hidden(folder)) == left
    assert native.holds_optimizer(first) == whole
    for step in (first, *others):
        assert_weights_stored(step, native.step_number(step))
    ps = grid()
    state, saver = build(ps), Checkpointer(folder, keep_last=2, keep_last_weights=2)
    assert saver.load_latest(state) == EXTRA
    assert_holds(state, ps, 3)
    saver.save(fill(state, ps, 4), EXTRA)  # finishes what was begun
    assert hidden(folder) == []
    steps = native.list_steps(folder)
    assert [(native.step_number(step), native.holds_optimizer(step)) for step in steps] == [
        (1, False), (2, False), (3, True), (4, True),
    ]  # fmt: skip
    for step in steps:
        assert (step / "optimizer").exists() == native.holds_optimizer(step)
        assert_weights_stored(step, native.step_number(step))


# ---- at random moments


def save_for_ever(
    rank: int,
    world: int,
    meeting: str,
    report: Connection | None,
    folder: Path,
    asynchronous: bool,
    seed: int,
) -> None:
    """Resume, check, save step after step; reports the last step that is known to be complete."""
    torch.set_num_threads(1)
    if world > 1:
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout
        )
    ps = grid(ep=world)
    state = build(ps)
    saver = Checkpointer(
        folder, keep_last=2, keep_last_weights=2, control=ps.control, asynchronous=asynchronous
    )
    if saver.load_latest(state) is not None:
        assert_holds(state, ps, state.step)
    slow_down(random.Random(seed))
    known = state.step
    for step in range(state.step + 1, 10_000):
        if report is not None:
            report.send(known)
        saver.save(fill(state, ps, step), EXTRA)
        known = step - 1 if asynchronous else step


def slow_down(generator: random.Random) -> None:
    """Stretch the moments between the stages of a save, so that kills find them."""
    for module, name in (
        (shard_files, "_settle"),
        (native, "write_manifest"),
        (native, "set_latest"),
        (step_folders.os, "rename"),
        (step_folders.shutil, "rmtree"),
    ):
        setattr(module, name, slowly(getattr(module, name), generator))


def slowly(action: Callable, generator: random.Random) -> Callable:
    def run(*args: object, **kwargs: object) -> object:
        time.sleep(generator.uniform(0.0, 0.02))
        return action(*args, **kwargs)

    return run


@pytest.mark.parametrize(("world", "asynchronous"), [(1, False), (1, True), (2, False), (2, True)])
def test_kills_at_random_moments(tmp_path, world, asynchronous):
    generator = random.Random(world + 10 * asynchronous)
    folder, interrupted, round_ = tmp_path / "c", 0, 0
    while round_ < 4 or not interrupted:  # until a kill did what it is for
        round_ += 1
        assert round_ < 20
        with Group(world, tmp_path, save_for_ever, folder, asynchronous, round_) as group:
            words = [group.wait_for_word() for _ in range(3)]
            time.sleep(generator.uniform(0.0, 0.2))
            group.kill()
            known = group.last_word() or words[-1]
        interrupted += bool(hidden(folder))
        state = build(grid())
        Checkpointer(folder).load_latest(state)
        assert state.step >= known > 0
        assert_holds(state, grid(), state.step)
        for step in native.list_steps(folder):
            assert_weights_stored(step, native.step_number(step))
    assert_resumes(folder, state.step)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_death_of_one_rank_ends_the_save_of_the_others(tmp_path, asynchronous):
    with Group(2, tmp_path, save_for_ever, tmp_path / "c", asynchronous, 0) as group:
        known = 0
        while known < 2:
            known = group.wait_for_word()
        group.processes[1].kill()
        known = group.last_word() or known
        group.processes[0].join(20)
        assert group.processes[0].exitcode == 1  # an error of its own, no hang
    state = build(grid())
    Checkpointer(tmp_path / "c").load_latest(state)
    assert state.step >= known
    assert_holds(state, grid(), state.step)
