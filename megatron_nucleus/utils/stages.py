"""Programs of tools/ as steps of a larger program: one after another and remembered, or several side by side.

Every step is a command that anyone can type; its ``--json`` object (the last line of its stdout) is its result.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import IO

from megatron_nucleus.utils.errors import ConfigError, DataError, RankLostError, StoppedError, UserError
from megatron_nucleus.utils.files import sha256_file, write_json_atomic

ERRORS = {error.exit_code: error for error in (ConfigError, DataError, StoppedError, RankLostError)}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.1


def shown(argv: Iterable[str]) -> str:
    """A command as one types it in the repository's root."""
    return f"python {shlex.join(argv)}"


# One after another


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program call.

    name: key in steps.json and in the time table. argv: tools/<program> and its flags.
    reads: files whose content is part of the call, as its flags are.
    fresh: folders removed before the call: what an unfinished call may have left and the program would refuse to
        write into again, and what later stages would take for their own unfinished work on this one's old result.
    """

    name: str
    argv: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    fresh: tuple[Path, ...] = ()

    def key(self) -> dict:
        """What must be equal for a finished call to stand for this one."""
        return {"command": [*self.argv, "--json"], "reads": [sha256_file(path) for path in self.reads]}


class Runner:
    """Runs stages in order and remembers them in ``OUTPUT/steps.json``.

    A stage that finished with the same command is not run again; once one runs, all after it run, too.

    Args:
        output: folder that holds the memory. root: folder the commands run in. total: stages, for the display.
    """

    def __init__(self, output: Path, root: Path, total: int):
        self.path, self.root, self.total, self.count = output / "steps.json", root, total, 0
        memory = (
            json.loads(self.path.read_text()) if self.path.is_file() else {"finished": {}, "unfinished_s": {}}
        )
        self.finished, self.unfinished_s = memory["finished"], memory["unfinished_s"]

    def run(self, stage: Stage) -> dict:
        """The stage's ``--json`` object.

        Raises:
            UserError: the stage ended with an error (its own message is above); same exit code as the stage.
        """
        self.count += 1
        key = stage.key()
        print(f"\n[{self.count}/{self.total}] {stage.name}\n  $ {shown(key['command'])}", flush=True)
        before = self.finished.get(stage.name)
        if before and before["key"] == key:
            print(f"  finished before in {before['seconds']:.0f} s")
            return before["result"]
        self._forget_from(stage)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *key["command"]], cwd=self.root, stdout=subprocess.PIPE, text=True
        )
        with signals_left_to(process):
            output, _ = process.communicate()
        seconds = time.monotonic() - start + self.unfinished_s.pop(stage.name, 0.0)
        lines = output.strip().splitlines()
        if process.returncode:
            self.unfinished_s[stage.name] = seconds
            self._remember()
            print("\n".join(lines))
            raise ERRORS.get(process.returncode, UserError)(
                f"stage '{stage.name}' ended with code {process.returncode}; the same command continues there"
            )
        print("\n".join(f"  {line}" for line in lines[:-1]))
        result = json.loads(lines[-1])
        self.finished[stage.name] = {"key": key, "seconds": seconds, "result": result}
        self._remember()
        return result

    def seconds(self) -> dict[str, float]:
        """Wall time of every finished stage, interrupted calls included."""
        return {name: entry["seconds"] for name, entry in self.finished.items()}

    def commands(self) -> list[str]:
        """The finished stages' commands, in order."""
        return [shown(entry["key"]["command"]) for entry in self.finished.values()]

    def _forget_from(self, stage: Stage) -> None:
        """This stage and every later one will run: what they left is no longer current."""
        names = list(self.finished)
        if stage.name in names:
            for name in names[names.index(stage.name) :]:
                del self.finished[name]
        self._remember()
        for folder in stage.fresh:
            if folder.exists():
                shutil.rmtree(folder)

    def _remember(self) -> None:
        write_json_atomic(self.path, {"finished": self.finished, "unfinished_s": self.unfinished_s})


@contextlib.contextmanager
def signals_left_to(process: subprocess.Popen) -> Iterator[None]:
    """The running stage saves and ends on Ctrl-C, which reaches it by itself, and on SIGTERM, which is passed on.

    Without this the caller would die first, and kill the stage while it saves.
    """
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Side by side


@dataclasses.dataclass(frozen=True)
class Call:
    """One program call of a `Job`. argv: tools/<program> and its flags. log: file that gets what it says on stderr."""

    argv: tuple[str, ...]
    log: Path


# Yields calls one by one, is sent the --json object of each, and may raise UserError.
Job = Generator[Call, dict, None]


class Side:
    """One of the places at which jobs run: a job and its running program."""

    def __init__(self, name: str, job: Job, root: Path, environment: dict[str, str]):
        self.name, self.job, self.root, self.environment = name, job, root, environment
        self.process: subprocess.Popen | None = None
        self.call: Call | None = None
        self.stdout: IO[str] | None = None

    def advance(self, result: dict | None) -> bool:
        """Give the job the result of its call and start the next one; False when there is none."""
        try:
            self.call = self.job.send(result)
        except StopIteration:
            return False
        self.call.log.parent.mkdir(parents=True, exist_ok=True)
        self.stdout = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by `result`)
        with open(self.call.log, "a", encoding="utf-8") as log:
            log.write(f"$ {shown(self.call.argv)}\n")
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, *self.call.argv, "--json"],
                cwd=self.root, env=self.environment, stdin=subprocess.DEVNULL, stdout=self.stdout, stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C reaches the caller alone, which passes one signal on
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        return True

    def result(self) -> dict:
        """The ended program's object.

        Raises:
            UserError: it ended with an error, with the last line of its log; same exit code as the program.
        """
        code, log = self.process.returncode, self.call.log
        with self.stdout as file:
            file.seek(0)
            lines = file.read().strip().splitlines()
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            raise ERRORS.get(code, UserError)(f"{self.name}: ended with code {code}: {last} (see {log})")
        return json.loads(lines[-1])


def _die_with_parent() -> None:
    """In the child: when the caller is killed, its programs must not go on and hold their folders."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_side_by_side(
    jobs: Iterable[tuple[str, Job]],
    slots: int,
    *,
    root: Path,
    environment: dict[str, str] | None = None,
    end: float | None = None,
) -> dict[str, UserError]:
    """Run named jobs, ``slots`` at a time, each a chain of programs; returns the errors of those that failed.

    A job that fails does not stop the others. Whatever ends this function early, a stop signal too, ends the
    running programs first, with SIGTERM, and waits until they have saved.

    Args:
        root: folder the commands run in. environment: variables to add to this process's own.
        end: when to stop, on the clock of `time.monotonic`.

    Raises:
        StoppedError: ``end`` is over.
    """
    waiting, sides, failed = iter(jobs), [], {}
    variables = os.environ | (environment or {})
    try:
        while True:
            while len(sides) < slots and (entry := next(waiting, None)) is not None:
                side = Side(*entry, root, variables)
                _advance(side, None, sides, failed)
            if not sides:
                return failed
            if end is not None and time.monotonic() >= end:
                raise StoppedError("the time is over; the same command continues")
            time.sleep(_POLL_S)
            for side in [s for s in sides if s.process.poll() is not None]:
                sides.remove(side)
                try:
                    result = side.result()
                except UserError as error:
                    failed[side.name] = error
                    continue
                _advance(side, result, sides, failed)
    finally:
        for side in sides:
            side.process.terminate()
        for side in sides:
            side.process.wait()


def _advance(side: Side, result: dict | None, sides: list[Side], failed: dict[str, UserError]) -> None:
    try:
        if side.advance(result):
            sides.append(side)
    except UserError as error:
        failed[side.name] = error
