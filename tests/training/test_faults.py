"""Nothing is lost: real processes, killed, stopped and broken at random moments."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_nucleus.training import step_report
from tests.ranks import Launch, run_ranks
from tests.training.runs import assert_identical, curve, rows, same_curve, tensors, train_rank

pytestmark = pytest.mark.dist
EP2 = ["--expert-model-parallel-size", 2]


def command(config_file: Path, run_dir: Path, *flags: object) -> list:
    return ["--config", config_file, "--run-dir", run_dir, *EP2, *flags]


def quick_watchdog(rank: int) -> None:
    """A rank counts as dead after 3 s instead of 15."""
    from megatron_nucleus.training.watchdog.watchdog import Watchdog

    Watchdog.__init__.__kwdefaults__.update(heartbeat_s=0.3, dead_after_s=3.0)


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) >= step):
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.01)


LONG = ["--train-steps", 40, "--save-interval", 2, "--keep-last-checkpoints", 3]


@pytest.fixture
def whole(config_file, tmp_path) -> Path:
    """The run that nothing interrupts: two ranks, 40 steps, a checkpoint every second one."""
    run_ranks(2, train_rank, tmp_path, config_file, tmp_path / "whole", *EP2, *LONG)
    return tmp_path / "whole"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kill_9_at_random_moments_continues_bit_for_bit(asynchronous, whole, config_file, tmp_path):
    run_dir, dice = tmp_path / "killed", random.Random(7 + asynchronous)
    argv = command(config_file, run_dir, *LONG, "--async-save" if asynchronous else "--no-async-save")
    argv += ["--distributed-timeout-minutes", 0.5]
    for attempt in range(4):
        with Launch(2, argv, tmp_path / f"launch_{attempt}", quick_watchdog) as launch:
            seen = len(rows(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
            wait_for_step(run_dir, min(seen + dice.randint(1, 8), 38))
            time.sleep(dice.random() * 0.05)
            victims = launch.processes if attempt % 2 else [launch.processes[dice.randint(0, 1)]]
            for process in victims:
                process.kill()
            codes = launch.exit_codes()
        assert set(codes) <= {-9, 5}, [launch.stderr(rank) for rank in (0, 1)]
    with Launch(2, argv, tmp_path / "last") as launch:
        assert launch.exit_codes() == [0, 0], launch.stderr(0)
    same_curve(run_dir, whole)
    assert_identical(tensors(run_dir, 40), tensors(whole, 40))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(number, whole, config_file, tmp_path):
    run_dir = tmp_path / "stopped"
    argv = command(config_file, run_dir, *LONG)
    with Launch(2, argv, tmp_path / "first") as launch:
        wait_for_step(run_dir, 5)
        os.kill(launch.processes[1].pid, number)
        assert launch.exit_codes() == [4, 4], launch.stderr(0)
    name = signal.Signals(number).name
    assert f"error: received {name}: saved step" in launch.stderr(1)
    assert "error: rank 1 was asked to stop: saved step" in launch.stderr(0)
    with Launch(2, argv, tmp_path / "second") as launch:
        assert launch.exit_codes() == [0, 0], launch.stderr(0)
    same_curve(run_dir, whole)
    assert_identical(tensors(run_dir, 40), tensors(whole, 40))


def test_a_dead_rank_is_named(config_file, tmp_path):
    argv = command(config_file, tmp_path / "run", "--train-steps", 100000, "--save-interval", 0)
    with Launch(4, argv, tmp_path / "launch", quick_watchdog) as launch:
        wait_for_step(tmp_path / "run", 2)
        launch.processes[2].kill()
        assert launch.exit_codes() == [5, 5, -9, 5]
    for rank in (0, 1, 3):
        assert "rank 2" in launch.stderr(rank), launch.stderr(rank)
        assert "the same command resumes" in launch.stderr(rank)


def test_a_stuck_rank_ends_the_others_within_the_timeout(config_file, tmp_path):
    argv = command(config_file, tmp_path / "run", "--train-steps", 100000, "--save-interval", 0)
    argv += ["--distributed-timeout-minutes", 0.05]
    with Launch(2, argv, tmp_path / "launch", quick_watchdog) as launch:
        wait_for_step(tmp_path / "run", 2)
        os.kill(launch.processes[1].pid, signal.SIGSTOP)
        start = time.monotonic()
        launch.processes[0].join(60)
        assert launch.processes[0].exitcode == 5, launch.stderr(0)
        assert time.monotonic() - start < 40
    message = launch.stderr(0)
    assert "rank 1" in message
    assert "step" in message


def break_data_of_rank_1(rank: int) -> None:
    from megatron_nucleus.data.loader import Loader
    from megatron_nucleus.utils.errors import DataError

    original, calls = Loader.__next__, []

    def broken(self):
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            raise DataError("/shards/00007.tar: cannot be read (Input/output error)")
        return original(self)

    Loader.__next__ = broken


def test_an_error_of_one_rank_ends_the_others_which_say_why(config_file, tmp_path):
    argv = command(config_file, tmp_path / "run", "--train-steps", 1000)
    with Launch(2, argv, tmp_path / "launch", break_data_of_rank_1) as launch:
        assert launch.exit_codes() == [5, 3]
    assert "error: /shards/00007.tar: cannot be read" in launch.stderr(1)
    assert "rank 1" in launch.stderr(0)
    assert "/shards/00007.tar" in launch.stderr(0)


def train_with_bad_loss(config_file: Path, run_dir: Path, bad: dict[int, float], *flags: object) -> dict:
    """As `train_rank`, with rank 1's loss of step s multiplied by ``bad[s]``, gradients and all."""
    import torch.distributed as dist

    from megatron_nucleus.training import step

    original, taken = step.flow_loss_per_image, [0]

    def broken(velocity, target):
        taken[0] += 1
        factor = bad.get(taken[0], 1.0) if dist.get_rank() == 1 else 1.0
        return original(velocity, target) * factor

    step.flow_loss_per_image = broken
    return train_rank(config_file, run_dir, *flags)


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(config_file, tmp_path):
    flags = [*EP2, "--train-steps", 6, "--save-interval", 1]
    results = run_ranks(
        2, train_with_bad_loss, tmp_path, config_file, tmp_path / "run", {3: float("nan")}, *flags
    )
    assert [r["skipped"] for r in results] == [1, 1]
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]
    before, after = (tensors(tmp_path / "run", step) for step in (2, 3))
    assert_identical(after, before)
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert "step 3: loss of rank 1 is not finite; the update is skipped (1 in a row)" in log


def test_a_loss_spike_on_one_rank_skips_the_step_on_all(config_file, tmp_path):
    flags = [*EP2, "--train-steps", 60, "--save-interval", 1, "--loss-spike-factor", 5]
    results = run_ranks(2, train_with_bad_loss, tmp_path, config_file, tmp_path / "run", {55: 30.0}, *flags)
    assert [r["skipped"] for r in results] == [1, 1]
    assert_identical(tensors(tmp_path / "run", 55), tensors(tmp_path / "run", 54))
    assert (
        "of rank 1 is above 5 times the running mean"
        in (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    )


def test_skipping_too_often_stops_with_advice(config_file, tmp_path):
    bad = {step: float("inf") for step in range(3, 100)}
    flags = [*EP2, "--train-steps", 60, "--max-skipped-in-a-row", 4]
    with pytest.raises(AssertionError, match="4 steps in a row were skipped .up to step 6.*lower --lr"):
        run_ranks(2, train_with_bad_loss, tmp_path, config_file, tmp_path / "run", bad, *flags)


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_used(config_file, tmp_path):
    flags = [*EP2, "--train-steps", 6, "--save-interval", 2]
    run_ranks(2, train_rank, tmp_path, config_file, tmp_path / "whole", *flags)
    run_dir = tmp_path / "run"
    run_ranks(2, train_rank, tmp_path, config_file, run_dir, *EP2, "--train-steps", 4, "--save-interval", 2)
    victim = next((run_dir / "checkpoints" / "step_00000004" / "optimizer").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-7])
    run_ranks(2, train_rank, tmp_path, config_file, run_dir, *flags)
    assert_identical(tensors(run_dir, 6), tensors(tmp_path / "whole", 6))
    assert curve(run_dir) == curve(tmp_path / "whole")


def test_a_step_report_names_every_rank():
    import torch

    losses = step_report.StepLosses(*(torch.tensor(x) for x in (2.0, 1.5, 0.5, 0.25)))
    report = step_report.share_step(losses, torch.tensor(9.0, dtype=torch.float64), True, None)
    assert report == step_report.StepReport(2.0, 1.5, 0.5, 0.25, 3.0, (2.0,), (9.0,), (0,))
