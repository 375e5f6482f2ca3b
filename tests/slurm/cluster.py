"""A real Slurm on one machine: munged, slurmctld and a slurmd for each of two nodes, in one temporary folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch.runs import processes_with

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
# Nodes that share a host differ in name and port. As addresses of the loopback network their names can also be
# connected to, which is what the ranks do with the name of the first node.
NODES = ("127.0.0.2", "127.0.0.3")
GPUS_PER_NODE = 8
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits; the default is 120 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
ReturnToService=2
GresTypes=gpu
# Nodes as large as the sbatch files ask for, whatever this machine has.
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} CPUs=128 Gres=gpu:{gpus}\n"


def say(text: str) -> None:
    """One line of progress (pytest -s shows it)."""
    print(f"  {time.strftime('%H:%M:%S')} {text}", flush=True)


def install() -> None:
    """Install Slurm and munge where they are missing.

    Raises:
        RuntimeError: they are missing and cannot be installed, with the command to do it by hand.
    """
    missing = [name for name in PROGRAMS if _find(name) is None]
    if not missing:
        return
    by_hand = f"install it by hand: sudo apt-get install {' '.join(PACKAGES)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(f"Slurm is missing here ({', '.join(missing)}) and this user cannot; {by_hand}")
    say(f"installing {', '.join(PACKAGES)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"apt-get {command[0]} failed; {by_hand}\n{done.stderr[-2000:]}")


class Cluster:
    """Use as a context manager; afterwards no process of it is left.

    Attributes:
        folder: configuration, state and logs of the daemons, deleted at the end.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.folder.chmod(0o755)  # munged wants its socket reachable for all
        self._daemons: list[subprocess.Popen] = []
        self._environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start_daemons()
            self.wait_for(self._nodes_are_idle, "both nodes to be idle", 60)
        except BaseException:
            self._stop()
            raise
        say(f"Slurm runs in {self.folder}")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def command(self, *words: object, check: bool = True, **variables: str) -> str:
        """Output of one of Slurm's commands; ``variables`` are added to its environment."""
        done = subprocess.run(
            list(map(str, words)), env=self._environment | variables, capture_output=True, text=True, timeout=60
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{words[0]} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(self, *words: object, **variables: str) -> int:
        """`sbatch words...`; returns the job's number."""
        return int(self.command("sbatch", "--parsable", *words, **variables))

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` tells, such as JobState, Restarts and ExitCode."""
        text = self.command("scontrol", "show", "job", number, "--oneliner")
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def ranks(self, job: int) -> dict[int, int]:
        """Process id of each running rank of a job."""
        found = {}
        for pid in processes_with(f"SLURM_JOB_ID={job}"):
            with contextlib.suppress(OSError):
                if b"tools/train.py" in b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:3]):
                    environ = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
                    found[int(dict(s.split("=", 1) for s in environ if s)["RANK"])] = pid
        return found

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        """Poll until ``condition()`` holds; AssertionError after ``seconds`` or when a daemon is gone."""
        deadline = time.monotonic() + seconds
        while not condition():
            gone = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if gone or time.monotonic() > deadline:
                raise AssertionError(
                    f"waited {seconds:.0f} s for {what}; daemons gone: {gone}\n"
                    f"{self.command('squeue', check=False)}\n{self._logs()}"
                )
            time.sleep(0.25)

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        control_port, *ports = free_ports(1 + len(NODES))
        settings = {"host": host, "user": getpass.getuser(), "folder": self.folder}
        text = CONFIGURATION.format(control_port=control_port, **settings)
        for node, port in zip(NODES, ports, strict=True):
            text += NODE.format(node=node, host=host, port=port, gpus=GPUS_PER_NODE)
            (self.folder / f"spool_{node}").mkdir()
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(text)
        # Slurm only looks whether a GPU's device file exists.
        for number in range(GPUS_PER_NODE):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(256))

    def _start_daemons(self) -> None:
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        self._start("munged", "--foreground", *(f"--{k}={self.folder / v}" for k, v in files.items()))
        self.wait_for((self.folder / "munge.socket").exists, "munged", 20)
        self._start("slurmctld", "-D")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)

    def _start(self, program: str, *options: str) -> None:
        with open(self.folder / f"{program}_{len(self._daemons)}.log", "w") as log:
            # A session of its own: Ctrl-C is for the test, which then ends jobs and daemons in order.
            daemon = subprocess.Popen(
                [_find(program), *options], env=self._environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._daemons.append(daemon)

    def _nodes_are_idle(self) -> bool:
        return (
            self.command("sinfo", "--noheader", "--Node", "--format=%T", check=False).split() == ["idle"] * 2
        )

    def _logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=5)
        # What daemons leave: jobs that still run, and Slurm's own processes that look after them.
        for pid in processes_with(f"SLURM_CONF={self.folder / 'slurm.conf'}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons:
            daemon.wait(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on, below those that the system gives to outgoing connections at any moment."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.sample(range(20000, 32768), 200):
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free TCP ports from 20000 to 32767")


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
