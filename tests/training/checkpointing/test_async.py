"""Saving beside the training: what is written is the state at the call, and nothing that fails is lost."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from megatron_nucleus.export import native
from megatron_nucleus.training.checkpointing import checkpointer
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.utils.errors import DataError
from tests.ranks import run_ranks
from tests.support import ROOT
from tests.training.checkpointing.sharded_state import EXTRA, assert_holds, build, fill, grid


class Gate:
    """Holds back the writing of every save until it is opened; counts those that came."""

    def __init__(self):
        self.open, self.came = threading.Event(), threading.Event()
        write = checkpointer.write_tensors

        def wait_and_write(*args):
            self.came.set()
            assert self.open.wait(30)
            return write(*args)

        self.undo = lambda: setattr(checkpointer, "write_tensors", write)
        checkpointer.write_tensors = wait_and_write


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.undo()


def train_while_saving(folder: Path) -> None:
    ps = grid(ep=2, replicate=1)
    state, gate = build(ps), Gate()
    saver = Checkpointer(folder, control=ps.control, asynchronous=True)
    extra = {**EXTRA, "data": dict(EXTRA["data"])}
    assert saver.save(fill(state, ps, 4), extra) == folder / "step_00000004"
    assert gate.came.wait(30)  # the thread is in the middle of the save
    assert not (folder / "latest").exists()
    fill(state, ps, 5)  # in place, as an optimizer does
    extra["data"]["manifest_hash"] = "changed"
    if ps.world > 1:  # training talks meanwhile
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total == ps.world
    gate.open.set()
    saver.wait()
    assert (folder / "latest").read_text() == "step_00000004\n"
    assert_holds(state, ps, 5)
    assert saver.load_latest(state) == EXTRA
    assert_holds(state, ps, 4)
    gate.undo()


@pytest.mark.parametrize("world", [1, 2])
def test_the_files_hold_the_state_at_the_call(tmp_path, world):
    if world == 1:
        train_while_saving(tmp_path / "c")
    else:
        run_ranks(world, train_while_saving, tmp_path, tmp_path / "c")
    assert [step.name for step in native.list_steps(tmp_path / "c")][-1] == "step_00000004"


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    ps = grid()
    state, saver = build(ps), Checkpointer(tmp_path, asynchronous=True)
    saver.save(fill(state, ps, 1), EXTRA)
    threading.Timer(0.2, gate.open.set).start()
    saver.save(fill(state, ps, 2), EXTRA)
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert saver.load_latest(state) == EXTRA  # waits, too
    assert_holds(state, ps, 2)


def test_an_error_is_raised_by_the_next_call_once(tmp_path, monkeypatch, caplog):
    ps = grid()
    state, saver = build(ps), Checkpointer(tmp_path, asynchronous=True)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(folder, files):
        raise full

    for finish in (saver.wait, lambda: saver.save(fill(state, ps, 3), EXTRA)):
        with monkeypatch.context() as patch:
            patch.setattr(native, "write_manifest", fail)
            saver.save(fill(state, ps, 2), EXTRA)
            with pytest.raises(DataError, match=r"step_00000002: cannot be written \(No space left"):
                finish()
        assert native.list_steps(tmp_path) == []
        assert "a save in the background failed" in caplog.text  # said when it happens
        saver.wait()
    saver.save(fill(state, ps, 3), EXTRA)
    saver.wait()
    assert [step.name for step in native.list_steps(tmp_path)] == ["step_00000003"]


class Trouble(Exception):
    """Of the run, not of the save."""


def save_and_fail(folder: Path, step: int) -> None:
    ps = grid()
    with Checkpointer(folder, asynchronous=True) as saver:
        saver.save(fill(build(ps), ps, step), EXTRA)
        raise Trouble


def test_the_block_finishes_what_is_pending(tmp_path):
    ps = grid()
    state = build(ps)
    with Checkpointer(tmp_path, asynchronous=True) as saver:
        saver.save(fill(state, ps, 1), EXTRA)
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    with pytest.raises(Trouble):
        save_and_fail(tmp_path, 2)  # also after an error
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def test_an_error_does_not_wait_for_ever_for_a_pending_save(tmp_path, gate, monkeypatch, caplog):
    monkeypatch.setattr(checkpointer, "_GRACE_S", 0.1)
    with pytest.raises(Trouble):
        save_and_fail(tmp_path, 1)
    assert "dropped the pending save" in caplog.text
    assert native.list_steps(tmp_path) == []
    gate.open.set()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(30)


def test_an_error_of_the_run_is_not_hidden_by_that_of_a_save(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("writing failed")

    monkeypatch.setattr(checkpointer, "write_tensors", fail)
    with pytest.raises(Trouble):
        save_and_fail(tmp_path, 1)
    assert "the pending save failed: writing failed" in caplog.text


SCRIPT = """
    import sys, time
    sys.path.insert(0, {root!r})
    from megatron_nucleus.training.checkpointing import checkpointer
    from tests.training.checkpointing.sharded_state import EXTRA, build, fill, grid

    write = checkpointer.write_tensors
    checkpointer.write_tensors = lambda *args: (time.sleep(0.5), write(*args))[1]
    ps = grid()
    checkpointer.Checkpointer(sys.argv[1], asynchronous=True).save(fill(build(ps), ps, 1), EXTRA)
    sys.exit(7)
"""


def test_a_program_that_ends_without_waiting_still_finishes_its_save(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(root=str(ROOT)))
    done = subprocess.run([sys.executable, script, tmp_path / "c"], timeout=120, check=False)
    assert done.returncode == 7
    ps = grid()
    state = build(ps)
    assert Checkpointer(tmp_path / "c").load_latest(state) == EXTRA
    assert_holds(state, ps, 1)
