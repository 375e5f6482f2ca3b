"""The trainer under torchrun: on one host, over two hosts, and stopped through the launcher."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.runs import last_step, marked_environment
from tests.support import ROOT
from tests.training.runs import curve, run_here

pytestmark = pytest.mark.dist

TIMEOUT_S = 120
SUBNET = "10.213.77"  # exists in the namespaces of these tests alone


class Launcher:
    """Starts torchrun on this host or in a network namespace."""

    def __init__(self, environment: dict[str, str]):
        self._environment = environment

    def start(
        self, *options: str, training: list, host: list[str] | None = None, **variables: str
    ) -> subprocess.Popen:
        """Start torchrun with ``options`` and the trainer with the flags ``training``; host: a command prefix."""
        command = [*(host or []), sys.executable, "-m", "torch.distributed.run", *options]
        command += [str(ROOT / "tools/train.py"), *map(str, training)]
        return subprocess.Popen(
            command,
            env=self._environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @staticmethod
    def output(*processes: subprocess.Popen, code: int = 0) -> str:
        """Wait for all; what they printed. AssertionError if one ends with another code."""
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        text = "\n".join(outputs)
        assert [process.returncode for process in processes] == [code] * len(processes), text[-4000:]
        return text


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    """Ends every rank that a launcher of the test left behind."""
    with marked_environment() as environment:
        yield Launcher(environment)


def two_ranks(launcher: Launcher, *training: object) -> subprocess.Popen:
    return launcher.start("--standalone", "--nproc-per-node", "2", training=list(training))


def test_two_ranks_stop_on_sigterm_and_the_same_command_continues_the_curve(launcher, config_file, tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    flags = ("--config", config_file, "--save-interval", 0)
    process = two_ranks(launcher, *flags, "--run-dir", parts, "--train-steps", 1000)
    wait_for_steps(process, parts, 2)
    process.terminate()
    assert "received SIGTERM: saved step" in launcher.output(process, code=1)  # torchrun's own code
    steps = last_step(parts) + 2
    assert steps < 1000
    for run_dir in (parts, whole):
        launcher.output(two_ranks(launcher, *flags, "--run-dir", run_dir, "--train-steps", steps))
    assert curve(parts) == curve(whole)
    run_here(config_file, tmp_path / "one", "--train-steps", 4)
    for one, two in zip(curve(tmp_path / "one"), curve(whole)[:4], strict=True):
        assert two["samples_seen"] == one["samples_seen"]
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def wait_for_steps(process: subprocess.Popen, run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(run_dir) < steps:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, f"not at step {steps} in time"
        time.sleep(0.05)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable (veth); yields their names. Host i has the address SUBNET.(i+1)."""
    names = [f"nucleus{os.getpid()}_{i}" for i in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        first, second = names
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"{SUBNET}.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def ip(*words: str) -> None:
    """Call ip(8); skips the test where this user or this machine may not make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the program 'ip' (Debian: iproute2)")
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"this machine allows no network namespaces: ip {' '.join(words)}: {done.stderr.strip()}")


def test_two_hosts_meet_and_train_as_one_host_does(launcher, config_file, tmp_path):
    """Each host has a loopback of its own, so that an address that is right on one host only shows."""
    with two_hosts() as hosts:
        processes = [
            launcher.start(
                "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test",
                "--rdzv-endpoint", f"{SUBNET}.1:29500", "--local-addr", f"{SUBNET}.{number}",
                # By default a host finds out from its name whether it is the endpoint's; these two share a name.
                "--rdzv-conf", f"is_host={int(number == 1)}",
                training=["--config", config_file, "--run-dir", tmp_path / "two"],
                host=["ip", "netns", "exec", name],
                GLOO_SOCKET_IFNAME="cable",
            )
            for number, name in enumerate(hosts, start=1)
        ]  # fmt: skip
        launcher.output(*processes)
    launcher.output(two_ranks(launcher, "--config", config_file, "--run-dir", tmp_path / "one"))
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
