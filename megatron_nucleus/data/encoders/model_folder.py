"""Finding and checking the folder of a published encoder before a library opens it.

A folder is the model's own or a diffusers pipeline's; a hub id is ``owner/name[@revision]``. Only safetensors
weights are read.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_nucleus.utils.devices import DTYPES
from megatron_nucleus.utils.errors import ConfigError, DataError, nearest

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")


def locate(path: str | None, option: str, allow: tuple[str, ...], ignore: tuple[str, ...]) -> Path:
    """The local folder of ``path``, fetched from the hub when it is no folder but looks like a hub id.

    Args:
        option: knob of section ``encoders``, for messages.
        allow, ignore: file patterns for the hub; ``*`` also crosses folders.

    Raises:
        ConfigError: no path, no such folder, or the hub cannot give it.
    """
    label = f"encoders.{option} (--{option.replace('_', '-')})"
    if not path:
        raise ConfigError(f"{label} is required: a folder, or a hub id such as owner/name")
    if Path(path).is_dir():
        return Path(path)
    if not _HUB_ID.fullmatch(path):
        raise ConfigError(
            f"{label}: {path} is no folder; give the model's folder or a hub id such as owner/name"
        )
    hub = import_library("huggingface_hub", f"{label} = {path} (no folder here, so a hub id)")
    repo, _, revision = path.partition("@")
    try:
        folder = hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(allow), ignore_patterns=list(ignore)
        )
    except (OSError, ValueError, RuntimeError, hub.errors.HfHubHTTPError) as error:
        raise ConfigError(
            f"{label}: {path} is neither a folder here nor a hub id that can be fetched now "
            f"({first_line(error)})"
        ) from error
    return Path(folder)


def model_folder(root: Path, subfolder: str, key: str, expected: str) -> Path:
    """``root/subfolder`` or ``root``, the one that holds a config.json; its ``key`` must be ``expected``.

    Raises:
        DataError: no config.json, a damaged one, or one of another model.
    """
    folder = root / subfolder if (root / subfolder / "config.json").is_file() else root
    config = folder / "config.json"
    if not config.is_file():
        raise DataError(f"{config}: no such file; give the folder of the model or of a diffusers pipeline")
    found = read_json(config).get(key)
    if found != expected:
        raise DataError(f"{config}: {key} is {found!r}, expected {expected!r}; give another folder")
    return folder


def weight_files(folder: Path, stem: str) -> dict[str, Path]:
    """``{tensor name: file}`` of a single or sharded safetensors checkpoint.

    Raises:
        DataError: a file is missing, or its header is damaged.
    """
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise DataError(f"{index}: no weight_map; copy the file again")
        for name in sorted(set(weight_map.values())):
            if not (folder / name).is_file():
                raise DataError(f"{folder / name}: no such file, though {index.name} names it; copy it there")
            _tensor_names(folder / name)
        return {key: folder / name for key, name in weight_map.items()}
    if not single.is_file():
        raise DataError(f"{single}: no such file; only safetensors weights are read")
    return dict.fromkeys(_tensor_names(single), single)


def import_library(name: str, needed_by: str) -> Any:
    """Import an optional package, or raise ConfigError saying who needs it."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken optional package may raise anything at import
        raise ConfigError(
            f"{needed_by} needs the package {name}, which cannot be imported: {first_line(error)}"
        ) from error


def dtype_named(name: str) -> torch.dtype:
    """torch dtype of an ``encoder_dtype``; ConfigError when unknown."""
    if name not in DTYPES:
        raise ConfigError(
            f"encoders.encoder_dtype: '{name}' is unknown{nearest(str(name), DTYPES)}; "
            f"one of: {', '.join(DTYPES)}"
        )
    return DTYPES[name]


def read_json(path: Path) -> dict:
    """Read a JSON object; DataError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not valid JSON ({first_line(error)}); copy it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object; copy it again")
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:  # also compares the header with the file's length
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: damaged ({first_line(error)}); copy it again") from error
