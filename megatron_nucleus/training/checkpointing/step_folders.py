"""Renames and removals in a checkpoints folder, in an order that a kill at any point cannot make harmful.

Hidden folders beside the steps, all of them cleared by the next save:

    .tmp_step_x        a save that did not end
    .replaced_step_x   the earlier ``step_x`` while a new one takes its name; put back if that did not happen
    .old_step_x        pruned, perhaps deleted in part
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Container
from pathlib import Path

from megatron_nucleus.export import native
from megatron_nucleus.utils.staging import fsync_folder

log = logging.getLogger(__name__)


def staging_folder(target: Path) -> Path:
    """Where a save gathers what becomes ``target``."""
    return target.with_name(f".tmp_{target.name}")


def clear_leftovers(folder: Path) -> None:
    """Remove what killed saves left."""
    settle_replaced(folder)
    for pattern in (".tmp_step_*", ".old_step_*", ".latest.tmp*"):
        for leftover in folder.glob(pattern):
            _remove(leftover)


def settle_replaced(folder: Path) -> None:
    """Where a save ended between its two renames, give the earlier checkpoint its name again."""
    for replaced in folder.glob(".replaced_step_*"):
        step = replaced.with_name(replaced.name.removeprefix(".replaced_"))
        if step.exists():
            _remove(replaced)
        else:
            _rename(replaced, step)


def publish(target: Path) -> None:
    """Give a staged checkpoint its name and point ``latest`` at it; an earlier one of that name is replaced.

    Raises:
        OSError: ``latest`` is as it was.
    """
    staging, folder = staging_folder(target), target.parent
    for inner in (*(p for p in staging.iterdir() if p.is_dir()), staging):
        fsync_folder(inner)
    if target.exists():  # of a run that went back to an older checkpoint, or a damaged one
        os.rename(target, target.with_name(f".replaced_{target.name}"))
    os.rename(staging, target)
    fsync_folder(folder)
    native.set_latest(folder, target)
    fsync_folder(folder)
    settle_replaced(folder)


def prune(folder: Path, keep_last: int, damaged: Container[str]) -> None:
    """Delete step folders older than the newest ``keep_last``, counted back from the one that ``latest`` names.

    Args:
        damaged: names of folders that do not count as kept; they go when they are older than one that does.
    """
    branch = native.list_branch(folder)
    whole = [step for step in branch if step.name not in damaged]
    for step in branch[: branch.index(whole[-keep_last:][0])]:
        hidden = step.with_name(f".old_{step.name}")  # a half-deleted folder must not look like a checkpoint
        if _rename(step, hidden):
            _remove(hidden)


def _rename(path: Path, new: Path) -> bool:
    try:
        os.rename(path, new)
    except OSError as error:
        log.warning("%s: cannot be renamed to %s (%s)", path, new.name, error.strerror)
        return False
    return True


def _remove(path: Path) -> None:
    """Delete what counts no more. A failure is no reason to lose a save: the next one tries again."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s: cannot be removed (%s)", path, error.strerror)
