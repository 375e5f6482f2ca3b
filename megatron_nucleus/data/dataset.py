"""A finished data set folder, opened for reading: `open_corpus`, and the content of encoded samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from megatron_nucleus.data import index
from megatron_nucleus.data.manifest import read_manifest
from megatron_nucleus.data.shards import ShardReader
from megatron_nucleus.types import Caption
from megatron_nucleus.utils.errors import DataError

EMPTY_TEXT_FILE = "empty_text.safetensors"
_COLUMNS = ("id", "tar", "offset", "length", "aspect_bucket")


class StoredSample(NamedTuple):
    """A sample as it lies in its shard.

    payload: original image bytes, or the safetensors of an encoded data set. info: the parsed ``<id>.json``.
    """

    id: str
    bucket: str
    payload: bytes
    info: dict
    captions: tuple[Caption, ...]


class Corpus:
    """A data set folder: where every sample lies, in 52 bytes of memory each.

    Rows are numbered bucket by bucket: bucket b owns rows ``start[b] .. start[b] + buckets[b]``. Captions are
    read from the ``<id>.json`` beside the image in the same read: memory does not grow with their length.

    Attributes:
        root: the folder. manifest: parsed ``manifest.json``. manifest_hash: hex sha256 of its bytes.
        buckets: bucket name -> number of samples, sorted by name. start: bucket name -> first row.
        encoded: None for images, or {"codec": spec, "text_encoder": spec, "resolution_px": n}.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.manifest, self.manifest_hash = read_manifest(root)
        self.encoded: dict | None = self.manifest.get("encoded")
        _check_files(self.root, self.manifest)
        columns, names = _load_columns(self.root, self.manifest)
        rank = np.argsort(np.argsort(names["aspect_bucket"]))  # number buckets by name
        codes = rank[columns["aspect_bucket"]]
        order = np.argsort(codes, kind="stable")
        counts = np.bincount(codes, minlength=len(rank))
        self.buckets = dict(zip(sorted(names["aspect_bucket"]), counts.tolist(), strict=True))
        self.start = dict(
            zip(self.buckets, np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist(), strict=True)
        )
        self._tars, self._tar = names["tar"], columns["tar"][order]
        self._offset, self._length = columns["offset"][order], columns["length"][order]
        self._id = columns["id"][order]
        self._reader = ShardReader(self.root)

    def __len__(self) -> int:
        return len(self._offset)

    def id(self, row: int) -> str:
        """Content id (hex sha256) of a row."""
        return self._id[row].tobytes().hex()

    def bucket(self, row: int) -> str:
        """Aspect bucket of a row."""
        starts = list(self.start.values())
        return list(self.buckets)[int(np.searchsorted(starts, row, side="right")) - 1]

    def read(self, row: int) -> StoredSample:
        """Read one sample.

        Raises:
            DataError: the shard is missing or damaged there, or does not belong to the index.
        """
        key = self.id(row)
        tar = self._tars[self._tar[row]]
        payload, info = self._reader.read_sample(tar, int(self._offset[row]), int(self._length[row]), key)
        try:
            captions = tuple(Caption(**c) for c in info["captions"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.root / tar}: {key}.json holds no valid captions ({error})") from error
        return StoredSample(key, self.bucket(row), payload, info, captions)

    def empty_text(self) -> Tensor:
        """Stored features [L, U] of the empty caption (encoded data sets only)."""
        path = self.root / EMPTY_TEXT_FILE
        try:
            return load_safetensors(path.read_bytes())["text"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path}: missing or damaged ({error}); run tools/encode.py again") from error

    def close(self) -> None:
        """Close open shard files."""
        self._reader.close()


def open_corpus(path: str | Path) -> Corpus:
    """Open a data set folder made by ``tools/curate.py`` or ``tools/encode.py``.

    Raises:
        ConfigError: no such folder, or no data set in it.
        DataError: a file of the data set is missing, shortened, damaged or of an unknown version; names it.
    """
    return Corpus(path)


def _check_files(root: Path, manifest: dict) -> None:
    try:
        expected = [(s["tar"], s["bytes"]) for s in manifest["shards"]]
        expected += [(p["path"], p["bytes"]) for p in manifest["index"]]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{root / 'manifest.json'}: damaged ({error!r} missing); copy the data set again"
        ) from error
    for name, size in expected:
        if not (root / name).is_file():
            raise DataError(f"{root / name}: missing; copy the data set again or make it again")
        if (found := (root / name).stat().st_size) != size:
            raise DataError(
                f"{root / name}: {found} bytes, the manifest says {size}; copy the data set again"
            )


def _load_columns(root: Path, manifest: dict) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Columns of all parts, tar and bucket as int32 numbers, and the names that these numbers stand for."""
    parts: dict[str, list] = {name: [] for name in _COLUMNS}
    numbers: dict[str, dict[str, int]] = {"tar": {}, "aspect_bucket": {}}
    for entry in manifest["index"]:
        path = root / entry["path"]
        file = index.open_parquet(path, index.INDEX_SCHEMA)
        try:
            table = file.read(columns=list(_COLUMNS))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{path}: damaged ({reason}); copy the data set again or make it again"
            ) from error
        finally:
            file.close()
        parts["id"].append(_ids(table["id"], path))
        for name, known in numbers.items():
            encoded = table[name].combine_chunks().dictionary_encode()
            here = [known.setdefault(v, len(known)) for v in encoded.dictionary.to_pylist()]
            parts[name].append(np.array(here, np.int32)[encoded.indices.to_numpy()])
        for name in ("offset", "length"):
            parts[name].append(table[name].to_numpy())
    columns = {name: np.concatenate(values) if values else np.empty(0) for name, values in parts.items()}
    if len(columns["offset"]) != manifest["samples"] or not manifest["samples"]:
        raise DataError(
            f"{root}: the index has {len(columns['offset'])} rows, the manifest says {manifest['samples']} "
            "samples; copy the data set again or make it again"
        )
    return columns, {name: list(known) for name, known in numbers.items()}


def _ids(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    try:
        raw = bytes.fromhex("".join(column.to_pylist()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: column id holds no hex sha256 ({error})") from error
    if len(raw) != 32 * len(column):
        raise DataError(f"{path}: column id holds no hex sha256")
    return np.frombuffer(raw, np.uint8).reshape(len(column), 32)


def pack_features(latents_CHW: Tensor, texts_LU: Sequence[Tensor]) -> bytes:
    """Content of an encoded sample's ``.safetensors``: latents and the features of every caption, in order.

    texts_LU: one [L_i, U] tensor per caption of the sample's JSON, real tokens only (no padding).
    """
    tensors = {f"text_{i}": t.contiguous() for i, t in enumerate(texts_LU)}
    return save_safetensors({"latents": latents_CHW.contiguous(), **tensors})


def unpack_features(payload: bytes, caption: int | None) -> tuple[Tensor, Tensor | None]:
    """Latents [C, H, W] and the features [L, U] of one caption (None: of no caption) of an encoded sample.

    Raises:
        DataError: the bytes are damaged or hold no such caption.
    """
    try:
        tensors = load_safetensors(payload)
        return tensors["latents"], None if caption is None else tensors[f"text_{caption}"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"damaged encoded sample ({error})") from error


def pack_empty_text(text_LU: Tensor) -> bytes:
    """Content of ``empty_text.safetensors``."""
    return save_safetensors({"text": text_LU.contiguous()})
