"""Renames and removals in a checkpoints folder, in an order that a kill at any point cannot make harmful.

Hidden folders beside the steps, all of them cleared by the next save:

    .tmp_step_x        a save that did not end
    .replaced_step_x   the earlier ``step_x`` while a new one takes its name; put back if that did not happen
    .old_step_x...     pruned, or the optimizer state of a step kept for its weights; perhaps deleted in part
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Container
from pathlib import Path

from megatron_nucleus.export import native
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import exclusive
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


def choose_latest(run_dir: Path, step: int) -> Path:
    """Point ``latest`` of a run at its checkpoint of ``step``: where it goes on when it is started the next time.

    Later step folders stay until the run comes to their steps again. Sizes of files are checked, checksums when the
    run starts.

    Returns:
        the step folder.

    Raises:
        ConfigError: no such checkpoint, one of weights alone, or a run that is going on. DataError: a damaged one.
    """
    folder = run_dir / "checkpoints"
    steps = {native.step_number(path): path for path in native.list_steps(folder)}
    if step not in steps:
        there = f"those of steps {', '.join(map(str, steps))}" if steps else "none"
        raise ConfigError(f"--set-latest {step}: {folder} holds no such checkpoint, but {there}")
    with exclusive(run_dir, "--run-dir"):
        if not native.holds_optimizer(steps[step]):
            raise ConfigError(f"--set-latest {step}: {weights_alone(steps[step])}")
        native.verify(steps[step], checksums=False)
        native.set_latest(folder, steps[step])
    return steps[step]


def weights_alone(step: Path) -> str:
    """What to do with a checkpoint without optimizer state, as the end of a message."""
    return (
        f"{step}, which holds weights and no optimizer state, so no run resumes from it; start a new run from it: "
        f"--init-from {step} --run-dir NEW"
    )


def prune(folder: Path, keep_last: int, keep_last_weights: int | None, damaged: Container[str]) -> None:
    """Keep the newest ``keep_last`` whole checkpoints, counted back from the one that ``latest`` names.

    Of the step folders older than these the newest ``keep_last_weights`` (None = 0) lose their optimizer state, the
    others are deleted.

    Args:
        damaged: names of folders that do not count as kept; they go when they are older than a whole one that does.
    """
    branch = native.list_branch(folder)
    usable = [step for step in branch if step.name not in damaged]
    whole = [step for step in usable if is_whole(step)][-keep_last:]
    if not whole:
        return
    older = branch[: branch.index(whole[0])]
    for_weights = [step for step in older if step in usable][::-1][: keep_last_weights or 0]
    for step in older:
        if step in for_weights:
            _drop_optimizer(step)
        else:
            # a half-deleted folder must not look like a checkpoint
            _rename_and_remove(step, step.with_name(f".old_{step.name}"))


def is_whole(step: Path) -> bool:
    """Whether a checkpoint has optimizer state to go on from; False also where its manifest cannot be read."""
    try:
        return native.holds_optimizer(step)
    except DataError:
        return False


def _drop_optimizer(step: Path) -> None:
    """Leave a checkpoint its weights alone.

    The manifest comes first: before and after its replacement everything that it lists is there. What a kill leaves
    to do is done when the next save prunes.
    """
    try:
        files = native.read_manifest(step)
        kept = {name: entry for name, entry in files.items() if not name.startswith("optimizer/")}
        for leftover in step.glob(".manifest.json.tmp*"):
            _remove(leftover)
        if kept != files:
            native.write_manifest(step, kept)
            fsync_folder(step)
        if (step / "optimizer").exists():
            _rename_and_remove(step / "optimizer", step.with_name(f".old_{step.name}_optimizer"))
    except (OSError, DataError) as error:  # no reason to lose a save: the next one tries again
        log.warning("%s: its optimizer state could not be dropped (%s)", step, error)


def _rename_and_remove(path: Path, hidden: Path) -> None:
    if _rename(path, hidden):
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
