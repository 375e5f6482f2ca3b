"""The project's own sbatch files on a real Slurm of two nodes: `make test-slurm`, a few minutes.

Not named test_*, so that no other run collects it: where Slurm is missing it installs system packages.
Only sbatch's options and the environment differ from a user's submission. Slurm grants 8 GPUs a node that are empty
files; the ranks compute on the CPU.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.runs import last_step
from tests.slurm.cluster import Cluster, install, say
from tests.support import ROOT
from tests.training.runs import curve

pytestmark = pytest.mark.timeout(1200)

RANKS = 4
ONE_NODE = ROOT / "examples/slurm/train_1node.sbatch"
MANY_NODES = ROOT / "examples/slurm/train_8nodes.sbatch"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed test stops its cluster, too
    try:
        print(flush=True)
        install()
        with Cluster() as running:
            yield running
        say("Slurm is stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


class Run:
    """A run folder, and the job that trains in it."""

    def __init__(self, cluster: Cluster, config_file: Path, folder: Path):
        self.cluster, self.config_file, self.folder = cluster, config_file, folder
        self.job = 0

    def submit(
        self, file: Path, *options: object, flags: tuple = (), nodes: int = 2, **variables: str
    ) -> None:
        """Submit ``file`` with `RANKS` ranks over ``nodes`` nodes, the trainer's ``flags`` and more variables."""
        self.job = self.cluster.submit(
            f"--nodes={nodes}", f"--ntasks-per-node={RANKS // nodes}", "--cpus-per-task=2",
            f"--output={self.folder}.%j.out", *options, file, *flags,
            **{
                "REPO": str(ROOT), "PYTHON": sys.executable, "CONFIG": str(self.config_file),
                "RUN_DIR": str(self.folder), "GLOO_SOCKET_IFNAME": "lo",
            } | variables,
        )  # fmt: skip
        say(f"job {self.job}: {file.name} on {nodes} nodes, {RANKS} ranks, {' '.join(map(str, flags))}")

    @property
    def log(self) -> str:
        file = Path(f"{self.folder}.{self.job}.out")
        return file.read_text() if file.exists() else ""

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"])

    def wait_for_start(self, number: int, seconds: float) -> None:
        """Start 0 is the first; the ranks of the one before have ended."""
        self.wait(lambda: f"start {number}:" in self.log, f"start {number} of job {self.job}", seconds)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: last_step(self.folder) >= step, f"step {step}", 180)

    def wait_for_end(self, state: str, seconds: float) -> None:
        """The job ends in ``state``: COMPLETED, FAILED or CANCELLED."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait(
            lambda: self.cluster.job(self.job)["JobState"] in ended, f"the end of job {self.job}", seconds
        )
        self.wait(lambda: not self.cluster.ranks(self.job), "the end of all ranks", 60)
        assert self.cluster.job(self.job)["JobState"] == state, self.logs()

    def wait(self, condition, what: str, seconds: float) -> None:
        try:
            self.cluster.wait_for(condition, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def logs(self) -> str:
        files = sorted((self.folder / "slurm").glob("*.log"))
        return self.log + "".join(f"\n--- {file.name}\n{file.read_text()[-1500:]}" for file in files)


def test_a_stopped_requeued_and_broken_job_continues_one_curve(cluster, config_file, tmp_path):
    run = Run(cluster, config_file, tmp_path / "run")

    # Slurm looks every 30 s: of a limit of 2 minutes with 60 s of warning, the signal comes after 30 to 60 s.
    run.submit(MANY_NODES, "--time=2", "--signal=USR1@60", flags=("--train-steps", 10**6))
    run.wait_for_start(1, 180)
    assert "saved and stopped: requeue" in run.log, run.logs()
    assert run.logs().count("received SIGUSR1") == RANKS
    say(
        f"the time limit's signal came: saved step {last_step(run.folder)}, exit code 4, requeued by the job itself"
    )
    cluster.command("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")

    run.wait_for_step(last_step(run.folder) + 4)
    say(f"scontrol requeue at step {last_step(run.folder)}")
    cluster.command("scontrol", "requeue", run.job)
    run.wait_for_start(2, 120)
    assert run.logs().count("received SIGTERM") == RANKS

    run.wait_for_step(last_step(run.folder) + 4)
    say(f"kill -9 of rank 3 at step {last_step(run.folder)}")
    os.kill(cluster.ranks(run.job)[3], signal.SIGKILL)
    run.wait_for_start(3, 120)
    assert "code 137, a rank was killed by SIGKILL" in run.log
    assert run.log.count("Exited with exit code 5") >= 1

    run.wait_for_step(last_step(run.folder) + 4)
    say(f"scancel at step {last_step(run.folder)}")
    cluster.command("scancel", run.job)
    run.wait_for_end("CANCELLED", 120)
    assert run.log.count("saved and stopped") == 1  # a cancelled job does not ask to be started again
    steps = last_step(run.folder) + 5

    run.submit(MANY_NODES, "--time=30", flags=("--train-steps", steps))
    run.wait_for_end("COMPLETED", 180)
    assert run.restarts == 0, run.logs()

    whole = Run(cluster, config_file, tmp_path / "whole")
    whole.submit(ONE_NODE, "--time=30", nodes=1, flags=("--train-steps", steps))
    whole.wait_for_end("COMPLETED", 600)
    assert whole.restarts == 0, whole.logs()
    rows = curve(whole.folder)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert curve(run.folder) == rows
    say(f"{steps} steps in 5 parts on two nodes: every number is that of one uninterrupted run on one node")


def test_a_bad_configuration_ends_the_job_without_a_restart(cluster, config_file, tmp_path):
    run = Run(cluster, config_file, tmp_path / "bad")
    run.submit(MANY_NODES, flags=("--global-batch-size", 6))
    run.wait_for_end("FAILED", 120)
    assert (cluster.job(run.job)["ExitCode"], run.restarts) == ("2:0", 0), run.logs()
    assert "code 2, bad configuration: stop" in run.log
    assert "--global-batch-size 6" in run.logs()


def test_a_rank_that_knows_the_cause_decides_and_lost_ranks_restart_the_job_a_few_times(
    cluster, config_file, tmp_path
):
    """Ranks that only return a code, in the trainer's place."""
    damaged = Run(cluster, config_file, tmp_path / "damaged")
    damaged.submit(
        MANY_NODES, PYTHON=program(tmp_path / "damaged.sh", "[ $RANK = 1 ] && exit 3; sleep 1; exit 5")
    )
    damaged.wait_for_end("FAILED", 60)
    assert (cluster.job(damaged.job)["ExitCode"], damaged.restarts) == ("3:0", 0), damaged.logs()

    # Starts 0 and 1 each reach a new checkpoint, start 2 does not.
    lost = Run(cluster, config_file, tmp_path / "lost")
    (lost.folder / "checkpoints").mkdir(parents=True)
    save = '[ ${SLURM_RESTART_COUNT:-0} = 2 ] || echo step_$SLURM_RESTART_COUNT > "$RUN_DIR/checkpoints/latest"; exit 5'
    lost.submit(MANY_NODES, PYTHON=program(tmp_path / "lost.sh", save), MAX_LOST="1")
    lost.wait_for_end("FAILED", 120)
    assert (cluster.job(lost.job)["ExitCode"], lost.restarts) == ("5:0", 2), lost.logs()
    assert "more than MAX_LOST=1 times since checkpoint 'step_1': stop" in lost.log


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)
