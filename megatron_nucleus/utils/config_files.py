"""YAML configuration files: sections of keys, on top of a base file, and which file said what.

base: stage1_256.yaml        # optional; relative to this file; may have a base of its own
training:
  global_batch_size: 1024    # sections are merged key by key, this file wins
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from megatron_nucleus.utils.errors import ConfigError

BASE = "base"


class Origins(dict[str, str]):
    """``section.key`` -> file that gave its value. others: keys whose value a flag or a default gave."""

    def __init__(self, files: Mapping[str, str] | None = None, others: Iterable[str] = ()):
        super().__init__(files or {})
        self.others = frozenset(others)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Put file and key before the message of a ConfigError about a value that stands in a file."""
        try:
            yield
        except ConfigError as error:
            origin = self.find(str(error))
            if origin is None:
                raise
            raise ConfigError(f"{origin}: {error}") from error

    def find(self, message: str) -> str | None:
        """``file: section.key`` of the first key that a message names, which is what it is about.

        A key is named as ``--some-key``, as ``section.some_key``, or, where it has an underscore, as ``some_key``.

        Returns:
            None where the message names no key or already a file, or where no file gave the first key's value: the
            keys after it are only what it is compared with.
        """
        if any(file in message for file in self.values()):
            return None
        found = []
        for name in (*self, *self.others):
            key = name.split(".", 1)[1]
            spellings = ["--" + key.replace("_", "-"), name, *([key] if "_" in key else [])]
            pattern = "|".join(rf"(?<![\w.-]){re.escape(s)}(?![\w-])" for s in spellings)
            if match := re.search(pattern, message):
                found.append((match.start(), -len(key), name))
        first = min(found)[2] if found else None
        return f"{self[first]}: {first}" if first in self else None


class ConfigFile(NamedTuple):
    """values: section -> key -> value, bases included. origins: which file each came from."""

    values: dict[str, dict]
    origins: Origins


def read_yaml(path: str | Path) -> ConfigFile:
    """Read a configuration file and the files it is based on.

    Raises:
        ConfigError: a file is missing, unreadable or no mapping of sections, or is its own base.
    """
    values: dict[str, dict] = {}
    origins = Origins()
    for file, layer in reversed(_layers(Path(path), ())):
        for section, keys in layer.items():
            if keys is None:
                keys = {}
            if not isinstance(keys, dict):
                raise ConfigError(f"{file}: section '{section}' must be a mapping, got {keys!r}")
            values.setdefault(section, {}).update(keys)
            origins.update({f"{section}.{key}": str(file) for key in keys})
    return ConfigFile(values, origins)


def _layers(path: Path, above: tuple[Path, ...]) -> list[tuple[Path, dict]]:
    """(file, its own sections), the given file first, then its base, and so on."""
    label = f"--config {path}" if not above else f"{above[-1]}: {BASE}: {path}"
    if not path.is_file():
        raise ConfigError(f"{label}: no such file")
    if path.resolve() in {p.resolve() for p in above}:
        raise ConfigError(f"{label}: is its own base ({' -> '.join(str(p) for p in (*above, path))})")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{label}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{label}: expected a mapping of sections, got {type(values).__name__}")
    base = values.pop(BASE, None)
    if base is None:
        return [(path, values)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: {BASE} must be the path of one file, got {base!r}")
    return [(path, values), *_layers(path.parent / base, (*above, path))]
