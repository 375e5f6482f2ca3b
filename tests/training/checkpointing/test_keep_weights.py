"""Old steps that are kept for their weights: complete, a part of the size, never resumed from."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from megatron_nucleus.export import native
from megatron_nucleus.training.checkpointing import step_folders
from megatron_nucleus.training.checkpointing.checkpointer import Checkpointer
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.ranks import run_ranks
from tests.training.checkpointing.sharded_state import (
    EXTRA,
    assert_holds,
    assert_weights_stored,
    build,
    fill,
    grid,
)


def save_steps(folder: Path, steps: list[int], asynchronous: bool = False, **keep: int | None) -> None:
    ps = grid()
    state = build(ps)
    with Checkpointer(folder, control=ps.control, asynchronous=asynchronous, **keep) as saver:
        for step in steps:
            saver.save(fill(state, ps, step), EXTRA)


def kept(folder: Path) -> dict[int, bool]:
    """Steps that are there, each with all of its weights; whether training can go on from them."""
    out = {}
    for step in native.list_steps(folder):
        number = native.step_number(step)
        assert_weights_stored(step, number)
        out[number] = native.holds_optimizer(step)
        assert (step / "optimizer").exists() == out[number]
    return out


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_the_newest_older_ones_lose_their_optimizer_state(tmp_path, world, asynchronous):
    folder = tmp_path / "c"
    args = (folder, [1, 2, 3, 4, 5, 6, 7], asynchronous)
    if world == 1:
        save_steps(*args, keep_last=2, keep_last_weights=3)
    else:
        run_ranks(world, save_steps, tmp_path, *args, keep_last=2, keep_last_weights=3)
    assert kept(folder) == {3: False, 4: False, 5: False, 6: True, 7: True}
    assert sorted(p.name for p in folder.iterdir())[0] == "latest"  # nothing hidden
    whole, weights = (
        sum(p.stat().st_size for p in (folder / f"step_0000000{n}").rglob("*.*")) for n in (7, 5)
    )
    assert weights < 0.75 * whole
    ps = grid()
    state = build(ps)
    assert Checkpointer(folder).load_latest(state) == EXTRA
    assert_holds(state, ps, 7)


def test_settings_that_change_between_runs(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4], keep_last=1, keep_last_weights=3)
    assert kept(tmp_path) == {1: False, 2: False, 3: False, 4: True}
    save_steps(tmp_path, [5], keep_last=3, keep_last_weights=2)  # 4 and 5 are all that is whole
    assert kept(tmp_path) == {2: False, 3: False, 4: True, 5: True}
    save_steps(tmp_path, [6])
    assert kept(tmp_path) == {2: False, 3: False, 4: True, 5: True, 6: True}
    save_steps(tmp_path, [7], keep_last=2)
    assert kept(tmp_path) == {6: True, 7: True}


def test_a_run_that_went_back_leaves_the_later_ones_alone(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 8, 9])
    native.set_latest(tmp_path, tmp_path / "step_00000003")
    save_steps(tmp_path, [4], keep_last=1, keep_last_weights=1)
    assert kept(tmp_path) == {3: False, 4: True, 8: True, 9: True}


def damage(step: Path) -> None:
    (file,) = (step / "optimizer").glob("*")
    file.write_bytes(file.read_bytes()[:-1])


def test_a_damaged_checkpoint_counts_neither_as_kept_nor_for_its_weights(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4])
    damage(tmp_path / "step_00000004")
    ps = grid()
    state, saver = build(ps), Checkpointer(tmp_path, keep_last=1, keep_last_weights=2)
    saver.load_latest(state)
    assert state.step == 3
    saver.save(fill(state, ps, 5), EXTRA)
    assert kept(tmp_path) == {2: False, 3: False, 5: True}


@pytest.mark.parametrize("first", ["write_manifest", "rename"])
def test_what_cannot_be_dropped_is_no_reason_to_lose_a_save(tmp_path, monkeypatch, caplog, first):
    save_steps(tmp_path, [1])
    module = native if first == "write_manifest" else step_folders.os
    good, calls = getattr(module, first), []

    def fails_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return good(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, first, fails_the_second_time)
        save_steps(tmp_path, [2], keep_last=1, keep_last_weights=1)
    assert re.search("step_00000001.*No space left on device", caplog.text)
    assert_weights_stored(tmp_path / "step_00000001", 1)
    save_steps(tmp_path, [3], keep_last=1, keep_last_weights=2)
    assert kept(tmp_path) == {1: False, 2: False, 3: True}


def test_an_unreadable_manifest_is_left_alone(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    manifest = tmp_path / "step_00000001" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text("{")
    save_steps(tmp_path, [3], keep_last=1, keep_last_weights=2)
    assert "its optimizer state could not be dropped" in caplog.text
    manifest.write_text(text)
    assert kept(tmp_path) == {1: True, 2: False, 3: True}


def resume(folder: Path) -> tuple[str, str]:
    """Kind and text of the error of a resume on this rank; the state stays as it was."""
    ps = grid()
    state = fill(build(ps), ps, 99)
    with pytest.raises((ConfigError, DataError)) as caught:
        Checkpointer(folder, control=ps.control).load_latest(state)
    assert_holds(state, ps, 99)
    return caught.type.__name__, str(caught.value)


@pytest.mark.parametrize("world", [1, 2])
def test_training_never_resumes_from_weights_alone(tmp_path, world):
    folder = tmp_path / "c"
    save_steps(folder, [1, 2, 3], keep_last=1, keep_last_weights=2)
    start = rf"start a new run from it: --init-from {folder}/step_00000002 --run-dir NEW"

    def fails(kind: str, pattern: str) -> None:
        errors = [resume(folder)] if world == 1 else run_ranks(world, resume, tmp_path, folder)
        assert set(errors) == {errors[0]}
        assert errors[0][0] == kind
        assert re.search(pattern, errors[0][1]), errors[0][1]

    damage(folder / "step_00000003")
    fails("DataError", rf"step_00000003/optimizer/.*; what is complete is {folder}/step_00000002, .*{start}")
    (folder / "latest").unlink()
    fails("DataError", rf"latest: missing.*{start}")
    native.set_latest(folder, folder / "step_00000002")  # a user who goes back
    fails(
        "ConfigError", rf"latest: names {folder}/step_00000002, which holds weights and no optimizer.*{start}"
    )


def test_weights_alone_are_passed_over_and_not_taken_for_damaged(tmp_path, caplog):
    save_steps(tmp_path, [1, 2, 3, 4])
    for step in (2, 3):
        step_folders._drop_optimizer(tmp_path / native.step_name(step))
    damage(tmp_path / "step_00000004")
    ps = grid()
    state, saver = build(ps), Checkpointer(tmp_path, keep_last=1, keep_last_weights=3)
    assert saver.load_latest(state) == EXTRA
    assert_holds(state, ps, 1)
    assert caplog.records[-1].getMessage() == f"resuming from {tmp_path}/step_00000001, which is complete"
    saver.save(fill(state, ps, 2), EXTRA)  # takes the place of the old step 2
    os.rename(tmp_path / "step_00000004", tmp_path / "elsewhere")
    assert kept(tmp_path) == {1: False, 2: True, 3: False}


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="--keep-last-weights 4: .*--keep-last-checkpoints N.*; give N as well"
    ):
        Checkpointer(tmp_path, keep_last_weights=4)
    with pytest.raises(ConfigError, match="--keep-last-weights 0: must be at least 1"):
        Checkpointer(tmp_path, keep_last=1, keep_last_weights=0)
