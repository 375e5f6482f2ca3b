"""The stage contract: counts reconcile, finished tasks are not run again, a dying process costs one item."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from typing import NamedTuple

import pytest

from megatron_nucleus.data.curation import captions, readers
from megatron_nucleus.data.curation.runner import Stage, make_stage, run_stage, total
from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import write_atomic


class Numbers(NamedTuple):
    name: str
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    poison: tuple[int, ...] = ()


def double(task, settings, folder, skip, started):
    """Doubles numbers; negative ones are rejected; a poisonous one takes the process down, as a decoder may."""
    out, rejected, quarantined = [], 0, 0
    for i, value in enumerate(task.values):
        started(i)
        if i in skip:
            quarantined += 1
        elif value in settings.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        elif value < 0:
            rejected += 1
        else:
            out.append(2 * value)
    write_atomic(folder / f"{task.name}.json", json.dumps(out))
    with open(folder / "calls.txt", "a") as file:
        file.write(f"{task.name}\n")
    return {
        "in": len(task.values),
        "kept": len(out),
        "rejected": {"negative": rejected} if rejected else {},
        "quarantined": {"crash": quarantined} if quarantined else {},
    }


def lossy(task, settings, folder, skip, started):
    return {"in": 3, "kept": 1, "rejected": {"x": 1}, "quarantined": {}}


def failing(task, settings, folder, skip, started):
    raise DataError(f"{task.name}: no good")


TASKS = [Numbers(f"t{i}", tuple(range(-1, i))) for i in range(6)]


def stage(settings=Settings(), run=double):
    return Stage("double", run, settings, f"v{settings.poison}")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_do_not_depend_on_the_workers(tmp_path, workers):
    seen = []
    results = run_stage(stage(), TASKS, tmp_path, workers, seen.append)
    assert [r["in"] for r in results] == [1, 2, 3, 4, 5, 6]
    assert sum(r["in"] for r in seen) == 21
    assert total(results) == {
        "in": 21,
        "kept": 15,
        "rejected": {"negative": 6},
        "quarantined": {},
        "notes": {},
    }
    assert json.loads((tmp_path / "t4.json").read_text()) == [0, 2, 4, 6]
    assert not list(tmp_path.glob(".*"))


def test_finished_tasks_are_not_run_again_until_the_version_changes(tmp_path):
    first = run_stage(stage(), TASKS[:3], tmp_path, 1)
    again = run_stage(stage(), TASKS, tmp_path, 1)
    assert again[:3] == first
    calls = (tmp_path / "calls.txt").read_text().split()
    assert calls == ["t0", "t1", "t2", "t3", "t4", "t5"]
    run_stage(Stage("double", double, Settings(), "other"), TASKS[:1], tmp_path, 1)
    assert (tmp_path / "calls.txt").read_text().split() == [*calls, "t0"]


def test_version_covers_settings_and_code():
    versions = [
        make_stage("s", double, Settings(), [captions]).version,
        make_stage("s", double, Settings(), [captions]).version,
        make_stage("s", double, Settings((1,)), [captions]).version,
        make_stage("s", double, Settings(), [readers]).version,
        make_stage("s", double, Settings(), [captions], "input changed").version,
    ]
    assert versions[0] == versions[1]
    assert len(set(versions)) == 4


def test_counts_that_do_not_reconcile_are_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="do not reconcile"):
        run_stage(stage(run=lossy), TASKS[:1], tmp_path, 1)
    assert not (tmp_path / "t0.success.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_stage_comes_through(tmp_path, workers):
    with pytest.raises(DataError, match="t0: no good"):
        run_stage(stage(run=failing), TASKS[:1], tmp_path, workers)


def test_an_item_that_kills_its_process_costs_that_item_alone(tmp_path):
    poison = Settings(poison=(2, 4))
    results = run_stage(stage(poison), TASKS, tmp_path, 2)
    assert total(results) == {
        "in": 21,
        "kept": 11,  # 15 without the three 2s and the one 4 that would be kept
        "rejected": {"negative": 6},
        "quarantined": {"crash": 4},
        "notes": {},
    }
    assert json.loads((tmp_path / "t5.json").read_text()) == [0, 2, 6]


def test_a_damaged_record_is_named(tmp_path):
    run_stage(stage(), TASKS[:1], tmp_path, 1)
    (tmp_path / "t0.success.json").write_text("{")
    with pytest.raises(DataError, match=r"t0\.success\.json: damaged"):
        run_stage(stage(), TASKS[:1], tmp_path, 1)
