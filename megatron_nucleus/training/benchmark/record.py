"""Keeps measurements in the tree: a JSON file with everything, and a Markdown table made of it.

An entry is known by its command, its hardware and its threads: measured again, it takes the old one's place. No
other entry is touched, and no file that was not made here.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import megatron_nucleus
from megatron_nucleus.training.run_folder import versions
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic
from megatron_nucleus.utils.hardware import hardware
from megatron_nucleus.utils.revision import git_commit

_NOT_OF_THE_COMMAND = "--record"  # with its value; --json is left out, too
# Distributions whose versions a time depends on, where they are installed.
LIBRARIES = (
    "triton",
    "diffusers",
    "flash-attn",
    "flash-attn-3",
    "transformer-engine",
    "torchao",
    "apex",
    "deep-ep",
)
# What of the source tree can change a measurement; recorded tables and notes cannot.
CODE = ("megatron_nucleus", "triton_ops", "csrc", "tools", "examples", "setup.py", "pyproject.toml")


def provenance(words: Sequence[str], device: torch.device | str) -> dict:
    """Where and with what something was measured: command, hardware, threads, versions, commit.

    The commit ends in ``-dirty`` where a file of `CODE` was changed or is new. A table that was just recorded into the
    tree does not count: the second measurement of a session is of the same code as the first.

    Args:
        words: the program and its arguments.
        device: of the measurement; a GPU is named before the host.
    """
    device = torch.device(device)
    host = hardware()
    if device.type == "cuda":
        host = f"{torch.cuda.get_device_name(device)}; host: {host}"
    return {
        "command": command(words),
        "hardware": host,
        "threads": torch.get_num_threads(),
        "versions": _versions(device),
        "commit": _commit(),
    }


def _versions(device: torch.device) -> dict[str, str]:
    out = {name: versions()[name] for name in ("megatron_nucleus", "torch", "python")}
    if device.type == "cuda":
        out["cuda"] = str(torch.version.cuda)
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return out


def _commit() -> str | None:
    commit = git_commit()
    if commit is None:
        return None
    status = subprocess.run(
        ["git", "status", "--porcelain", "--", *CODE],
        cwd=Path(megatron_nucleus.__file__).parents[1], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    clean = status.returncode == 0 and not status.stdout.strip()
    return commit.removesuffix("-dirty") + ("" if clean else "-dirty")


def command(words: Sequence[str]) -> str:
    """The command line without ``--record FILE`` and ``--json``, which change nothing of what is measured."""
    kept, skip = [], False
    for word in words:
        if skip or word == "--json" or word.startswith(f"{_NOT_OF_THE_COMMAND}="):
            skip = False
        elif word == _NOT_OF_THE_COMMAND:
            skip = True
        else:
            kept.append(word)
    return shlex.join(kept)


def check_record(path: str | Path, title: str | None = None) -> Path:
    """``--record``'s value as a path, checked before anything is measured.

    Args:
        title: as `record` will get it; None = not checked.

    Raises:
        ConfigError: not a Markdown file, its folder is missing or cannot be written to, or the file is there and is
            not one of `record` with this title.
        DataError: its JSON file cannot be read.
    """
    path = Path(path)
    if path.suffix != ".md" or not path.parent.is_dir() or path.is_dir():
        raise ConfigError(
            f"--record {path}: must be a Markdown file (.md) in a folder that exists; its JSON file stands beside it"
        )
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--record {path}: no right to write into {path.parent}")
    beside = path.with_suffix(".json")
    if beside.exists():
        _read(beside)
    first = path.read_text().partition("\n")[0] if path.exists() else None
    if first is not None and (not beside.exists() or title not in (None, first.removeprefix("# "))):
        raise ConfigError(f"--record {path}: holds something else ('{first[:40]}'); name another file")
    return path


def record(path: Path, entry: dict, title: str, table: Callable[[list[dict]], str]) -> None:
    """Add ``entry`` to ``path`` (Markdown) and to the JSON file beside it, or put it in the place of its forerunner.

    Processes that record at the same time wait for each other.

    Args:
        entry: holds `provenance`.
        title: first line of the Markdown file.
        table: Markdown of all entries.

    Raises:
        ConfigError, DataError: as `check_record`; nothing is written then.
    """
    with _alone(path.parent):
        beside = check_record(path, title).with_suffix(".json")
        entries = _read(beside) if beside.exists() else []
        places = [i for i, old in enumerate(entries) if _key(old) == _key(entry)]
        if places:
            entries[places[0]] = entry
        else:
            entries.append(entry)
        commands = "\n".join(f"{number}. `{e['command']}`" for number, e in enumerate(entries, 1))
        text = f"# {title}\n\n{table(entries)}\n\nCommands, by number:\n\n{commands}\n"
        write_json_atomic(beside, entries)
        write_atomic(path, text)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside the block no other process is in a block of this folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # lets go of the lock, too


def _key(entry: dict) -> tuple[str, str, int | None]:
    return entry["command"], entry["hardware"], entry.get("threads")


def _read(path: Path) -> list[dict]:
    try:
        entries = json.loads(path.read_text())
        for entry in entries:
            _key(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a list of measurements ({error}); move it away or mend it") from error
    return entries


def where(entry: dict) -> str:
    """Hardware, torch and commit of an entry as cells of a Markdown row."""
    commit = entry["commit"] or "none"
    short = commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")
    return f"{entry['hardware']} | {entry['versions']['torch']} | {short}"
