"""Generated pictures of a benchmark, in GenEval's folder layout, made once and continued after an interruption.

One folder ``seed_<N>`` per seed. In it ``settings.json`` says how they were made, ``<index>/metadata.jsonl`` holds one
JSON object (the prompt's record), ``<index>/samples/<number>.png`` the pictures. Beside the seeds' folders lie
``results.json`` and ``results.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from megatron_nucleus.export.native import read_manifest
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import open_atomic, write_atomic, write_json_atomic
from megatron_nucleus.utils.staging import check_writable, explain_write_error

SETTINGS_NAME = "settings.json"
RESULT_NAMES = ("results.json", "results.jsonl")
_PROBE_BYTES = 1 << 16
_SEED_NAME = re.compile(r"seed_(-?\d+)")
_OF_A_SEED = ("seed", "prompts")  # settings that differ between the seeds of one folder


class Request(NamedTuple):
    """One picture: position of its prompt in the list, and its number among that prompt's samples."""

    prompt: int
    sample: int


def seed_folders(output: Path) -> dict[int, Path]:
    """Folders of seeds in ``output``, by seed, in ascending order."""
    if not output.is_dir():
        return {}
    found = {m: path for path in output.iterdir() if (m := _SEED_NAME.fullmatch(path.name)) and path.is_dir()}
    return dict(sorted((int(match[1]), path) for match, path in found.items()))


def open_stores(
    output: str | Path, records: Mapping[int, Sequence[dict]], samples_per_prompt: int, settings: dict
) -> dict[int, SampleStore]:
    """A store for each seed of ``records``, in ``output/seed_<N>``; seeds that are there and not named stay.

    Nothing is written unless every folder fits.

    Args:
        records: the prompts' metadata of each seed.
        samples_per_prompt, settings: see `SampleStore`; the same for all seeds.

    Raises:
        ConfigError, DataError: see `SampleStore`; the other seeds in ``output`` must have the same settings, too.
    """
    output = Path(output)
    check_writable(output)
    strange = [p.name for p in output.iterdir() if not _belongs(p)] if output.is_dir() else []
    if strange:
        raise ConfigError(
            f"--output {output}: holds other files ({min(strange)}) and no pictures of seeds; name a new folder"
        )
    stores = {
        seed: SampleStore(output / f"seed_{seed}", of_seed, samples_per_prompt, {"seed": seed, **settings})
        for seed, of_seed in records.items()
    }
    for seed, folder in seed_folders(output).items():
        if seed not in stores and (folder / SETTINGS_NAME).is_file():
            next(iter(stores.values())).compare(folder / SETTINGS_NAME, ignore=_OF_A_SEED)
    for store in stores.values():
        store.create()
    return stores


def _belongs(path: Path) -> bool:
    return path.name.startswith(".") or path.name in RESULT_NAMES or bool(_SEED_NAME.fullmatch(path.name))


class SampleStore:
    """The folder of one seed of a benchmark run; nothing is written before `create`.

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
        self.settings = json.loads(json.dumps(settings))
        self._file = self.folder / SETTINGS_NAME
        if self._file.is_file():
            self.compare(self._file)
        elif self.folder.is_dir() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise ConfigError(
                f"--output {self.folder}: holds other files and no {SETTINGS_NAME}; name a new folder"
            )

    def create(self) -> None:
        """Write the settings and the prompts' folders, as far as they are not there.

        Raises:
            ConfigError: the folder cannot be written. DataError: the disk is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._file.is_file():
                write_json_atomic(self._file, self.settings)
            for index, record in enumerate(self.records):
                samples = self.folder / f"{index:05d}" / "samples"
                samples.mkdir(parents=True, exist_ok=True)
                write_atomic(samples.parent / "metadata.jsonl", json.dumps(record) + "\n")
        except OSError as error:
            raise explain_write_error(error, self.folder, "what was there is unchanged") from error

    def compare(self, file: Path, ignore: Collection[str] = ()) -> None:
        """Raise unless the settings in ``file`` are this store's, but for the keys to ``ignore``."""
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file}: damaged ({error}); name a new --output folder") from error
        stored = stored if isinstance(stored, dict) else {}
        keys = sorted((stored.keys() | self.settings.keys()).difference(ignore))
        changed = [key for key in keys if stored.get(key) != self.settings.get(key)]
        if not changed:
            return
        details = ", ".join(f"{key} {stored.get(key)} -> {self.settings.get(key)}" for key in changed)
        raise ConfigError(
            f"--output {file.parent}: holds samples made with other settings ({details}); "
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
    """Short name of a model: a hash of its weights and description in the manifest, or else of configs and probes.

    The optimizer's state does not count: a checkpoint that has lost it draws the same pictures. Probes are the first,
    middle and last 64 KiB of each file and its size, so that a large model is not read whole.
    """
    digest = hashlib.sha256()
    if (folder / "manifest.json").is_file():
        files = {n: e for n, e in read_manifest(folder).items() if not n.startswith("optimizer/")}
        digest.update(json.dumps(files, sort_keys=True).encode())
        return digest.hexdigest()[:16]
    for file in sorted(folder.glob("*.*")):
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
