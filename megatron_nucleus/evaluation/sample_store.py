"""Generated pictures of a benchmark, in GenEval's folder layout, made once and continued after an interruption.

``settings.json`` says how they were made, ``<index>/metadata.jsonl`` holds one JSON object (the prompt's record),
``<index>/samples/<number>.png`` the pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import open_atomic, write_atomic, write_json_atomic
from megatron_nucleus.utils.staging import check_writable, explain_write_error

SETTINGS_NAME = "settings.json"
_PROBE_BYTES = 1 << 16


class Request(NamedTuple):
    """One picture: position of its prompt in the list, and its number among that prompt's samples."""

    prompt: int
    sample: int


class SampleStore:
    """The folder of one benchmark run.

    Args:
        folder: new or empty, or a store made with the same settings and prompts.
        records: the prompts' metadata, in order.
        samples_per_prompt: pictures per prompt.
        settings: JSON values that decide what the pictures look like.

    Raises:
        ConfigError: the folder holds something else, or samples made with other settings (naming them).
        DataError: its settings file is damaged, or the disk is full.
    """

    def __init__(self, folder: str | Path, records: Sequence[dict], samples_per_prompt: int, settings: dict):
        if samples_per_prompt < 1:
            raise ConfigError(f"--samples-per-prompt {samples_per_prompt}: at least 1 is needed")
        self.folder, self.records, self.samples_per_prompt = Path(folder), list(records), samples_per_prompt
        lines = [json.dumps(record, sort_keys=True) for record in self.records]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        settings = {
            "format": 1,
            **settings,
            "samples_per_prompt": samples_per_prompt,
            "prompts": digest,
        }
        try:
            self._open(json.loads(json.dumps(settings)))
        except OSError as error:
            raise explain_write_error(error, self.folder, "what was there is unchanged") from error

    def _open(self, settings: dict) -> None:
        file = self.folder / SETTINGS_NAME
        check_writable(self.folder)
        if file.is_file():
            self._compare(file, settings)
        elif self.folder.is_dir() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise ConfigError(
                f"--output {self.folder}: holds other files and no {SETTINGS_NAME}; name a new folder"
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(file, settings)
        for index, record in enumerate(self.records):
            samples = self.folder / f"{index:05d}" / "samples"
            samples.mkdir(parents=True, exist_ok=True)
            write_atomic(samples.parent / "metadata.jsonl", json.dumps(record) + "\n")

    def _compare(self, file: Path, settings: dict) -> None:
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file}: damaged ({error}); name a new --output folder") from error
        if stored == settings:
            return
        stored = stored if isinstance(stored, dict) else {}
        changed = [
            key for key in sorted(stored.keys() | settings.keys()) if stored.get(key) != settings.get(key)
        ]
        details = ", ".join(f"{key} {stored.get(key)} -> {settings.get(key)}" for key in changed)
        raise ConfigError(
            f"--output {self.folder}: holds samples made with other settings ({details}); "
            "name a new folder or use the same settings"
        )

    def path(self, request: Request) -> Path:
        """File of one picture."""
        return self.folder / f"{request.prompt:05d}" / "samples" / f"{request.sample:04d}.png"

    def missing(self) -> list[Request]:
        """Pictures that are not there, or not whole, in order."""
        wanted = [Request(p, s) for p in range(len(self.records)) for s in range(self.samples_per_prompt)]
        return [request for request in wanted if not _is_whole(self.path(request))]

    def add(self, request: Request, picture: Image.Image) -> None:
        """Save one picture: whole under its final name, or not at all."""
        path = self.path(request)
        try:
            with open_atomic(path) as file:
                picture.save(file, "PNG", compress_level=1)
        except OSError as error:
            raise explain_write_error(error, path, "the pictures made so far are kept") from error


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):  # missing or cut short: it is made again
        return False
    return True


def fingerprint(folder: Path) -> str:
    """Short name of a checkpoint's contents: a hash of its manifest, or else of its configs and probes of its weights.

    Probes are the first, middle and last 64 KiB of each file and its size, so that a large model is not read whole.
    """
    digest = hashlib.sha256()
    manifest = folder / "manifest.json"
    for file in [manifest] if manifest.is_file() else sorted(folder.glob("*.*")):
        if file.suffix == ".json":
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix == ".safetensors":
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as stream:
                for position in (0, size // 2, max(size - _PROBE_BYTES, 0)):
                    stream.seek(position)
                    digest.update(stream.read(_PROBE_BYTES))
    return digest.hexdigest()[:16]
