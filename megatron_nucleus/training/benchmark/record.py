"""Keeps measurements in the tree: a JSON file with everything, and a Markdown table made of it.

An entry is known by its command and its hardware: measured again, it takes the old one's place.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_nucleus.training.run_folder import versions
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import write_atomic, write_json_atomic
from megatron_nucleus.utils.hardware import hardware
from megatron_nucleus.utils.revision import git_commit

_NOT_OF_THE_COMMAND = "--record"  # with its value; --json is left out, too


def provenance(words: Sequence[str], device: torch.device | str) -> dict:
    """Where and with what something was measured: command, hardware, versions, commit.

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
        "versions": {name: versions()[name] for name in ("megatron_nucleus", "torch", "python")},
        "commit": git_commit(),
    }


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


def check_record(path: str | Path) -> Path:
    """``--record``'s value as a path.

    Raises:
        ConfigError: not a Markdown file, or its folder is missing.
    """
    path = Path(path)
    if path.suffix != ".md" or not path.parent.is_dir():
        raise ConfigError(
            f"--record {path}: must be a Markdown file (.md) in a folder that exists; its JSON file stands beside it"
        )
    return path


def record(path: Path, entry: dict, title: str, table: Callable[[list[dict]], str]) -> None:
    """Add ``entry`` to ``path`` (Markdown) and to the JSON file beside it, or put it in the place of its forerunner.

    Args:
        entry: holds `provenance`.
        title: first line of the Markdown file.
        table: Markdown of all entries.

    Raises:
        DataError: the JSON file cannot be read; nothing is written then.
    """
    beside = path.with_suffix(".json")
    entries = _read(beside) if beside.exists() else []
    places = [i for i, old in enumerate(entries) if _key(old) == _key(entry)]
    if places:
        entries[places[0]] = entry
    else:
        entries.append(entry)
    write_json_atomic(beside, entries)
    commands = "\n".join(f"{number}. `{e['command']}`" for number, e in enumerate(entries, 1))
    write_atomic(path, f"# {title}\n\n{table(entries)}\n\nCommands, by number:\n\n{commands}\n")


def _key(entry: dict) -> tuple[str, str]:
    return entry["command"], entry["hardware"]


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
