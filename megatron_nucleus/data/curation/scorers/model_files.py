"""Where a scorer's model lies, and which one it is: checksums of its files, without opening it.

A model is a local folder as transformers saves it, or a hub id with the commit that is meant: a name alone may stand
for other weights tomorrow, and scores of two models must not be mixed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import sha256_file

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What decides the vectors of pictures, and what decides those of texts besides.
_PICTURE_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
_TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.model"),
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")


class ModelFiles(NamedTuple):
    """A model at hand.

    name: hub id, or the folder's name. revision: commit, or checksum of all files that are read.
    checksum: of what decides the vectors of pictures; the same for a hub id and for a folder that holds its files.
    """

    folder: Path
    name: str
    revision: str
    checksum: str


def check_address(model: str, revision: str) -> None:
    """Refuse what is neither a folder nor a hub id with its commit; fetches nothing.

    Raises:
        ConfigError: saying what to give.
    """
    if Path(model).is_dir():
        if revision:
            raise ConfigError(
                f"model_revision {revision}: {model} is a folder, whose revision is its checksum; leave it out"
            )
        return
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(f"model {model}: no such folder, and no hub id such as owner/name")
    if not _COMMIT.fullmatch(revision):
        raise ConfigError(
            f"model_revision {revision or '(none)'}: a hub model needs the commit that is meant, 40 hex digits "
            f"(listed at https://huggingface.co/{model}/commits/main); or give a local folder"
        )


def locate(model: str, revision: str = "") -> ModelFiles:
    """The model's folder, fetched from the hub when it is no folder here.

    Raises:
        ConfigError: as `check_address`, or the hub cannot give it.
        DataError: the folder lacks a file.
    """
    check_address(model, revision)
    if Path(model).is_dir():
        folder = Path(model)
        name, revision = folder.resolve().name, f"sha256:{_checksum(folder, with_text=True)}"
    else:
        folder, name = _fetch(model, revision), model
    return ModelFiles(folder, name, revision, f"sha256:{_checksum(folder, with_text=False)}")


def read_config(folder: Path) -> dict:
    """The model's config.json.

    Raises:
        DataError: missing or damaged.
    """
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; give a folder as transformers saves it") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object; copy it again")
    return value


def _fetch(model: str, commit: str) -> Path:
    try:
        import huggingface_hub
    except Exception as error:  # a broken optional package may raise anything at import
        raise ConfigError(
            f"model {model} (no folder here, so a hub id) needs the package huggingface_hub: {error}"
        ) from error
    patterns = [*_PICTURE_FILES, *_TEXT_FILES, *_WEIGHTS]
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=commit, allow_patterns=patterns))
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model {model} at {commit}: no folder here, and the hub cannot give it now ({reason})"
        ) from error


def _checksum(folder: Path, with_text: bool) -> str:
    """16 hex digits over the names and contents of a model's files."""
    names = [name for name in _PICTURE_FILES if (folder / name).is_file()]
    weights = sorted({path.name for pattern in _WEIGHTS for path in folder.glob(pattern)})
    if not weights:
        raise DataError(f"{folder}: no model.safetensors; only safetensors weights are read")
    names += weights
    if with_text:
        names += [name for name in _TEXT_FILES if (folder / name).is_file()]
    digest = hashlib.sha256()
    for name in names:
        path = (folder / name).resolve()
        status = path.stat()
        digest.update(f"{name} {_sha256_of(str(path), status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _sha256_of(path: str, size_bytes: int, mtime_ns: int) -> str:
    """Weights are read whole (about a second per 1.5 GB), once per process: fine-tuned ones have the same size."""
    return sha256_file(path)
