"""A finished data set folder, opened for reading: `open_corpus`, and the content of encoded samples."""

from __future__ import annotations

import itertools
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
from megatron_nucleus.data.manifest import check_files, read_manifest
from megatron_nucleus.data.shards import ShardReader
from megatron_nucleus.types import Caption
from megatron_nucleus.utils.errors import ConfigError, DataError

EMPTY_TEXT_FILE = "empty_text.safetensors"
_COLUMNS = ("id", "tar", "offset", "length", "aspect_bucket", "tier", "episode_bucket")
_NONE = -1  # code of a null tier or episode bucket
Cell = tuple[str | None, str | None]  # (tier, episode bucket)


class StoredSample(NamedTuple):
    """A sample as it lies in its shard.

    payload: original image bytes, or the safetensors of an encoded data set. info: the parsed ``<id>.json``.
    pixels: uint8 RGB [height, width, 3] of an image that was decoded together with others (`data/decoders.py`).
    """

    id: str
    bucket: str
    payload: bytes
    info: dict
    captions: tuple[Caption, ...]
    pixels: np.ndarray | None = None


class Corpus:
    """A data set folder: where every sample lies, in 54 bytes of memory each.

    Rows are numbered bucket by bucket: bucket b owns rows ``start[b] .. start[b] + buckets[b]``, inside it cell by
    cell (tier, then episode bucket, those without one first), inside a cell in the order of the index. Held-out
    samples have the rows behind all others. Captions are read from the ``<id>.json`` beside the image in the same
    read: memory does not grow with their length.

    Attributes:
        root: the folder. manifest: parsed ``manifest.json``. manifest_hash: hex sha256 of its bytes.
        buckets: bucket name -> number of training samples, sorted by name. start: bucket name -> first row.
        cells: bucket name -> {(tier, episode bucket): rows of its training samples}, in row order.
        held_out: rows kept out of training, by bucket and id. held_out_buckets: bucket name -> its part of them.
        encoded: None for images, or {"codec": spec, "text_encoder": spec, "resolution_px": n, ...}.
    """

    def __init__(self, root: str | Path, held_out_samples: int = 0):
        self.root = Path(root)
        self.manifest, self.manifest_hash = read_manifest(root)
        self.encoded: dict | None = self.manifest.get("encoded")
        check_files(self.root, self.manifest)
        columns, names = _load_columns(self.root, self.manifest)
        rank = np.argsort(np.argsort(names["aspect_bucket"]))  # number buckets by name
        codes = rank[columns["aspect_bucket"]]
        held = _smallest_ids(columns["id"], held_out_samples, self.root)
        order = _row_order(columns, codes, held)
        names_b = sorted(names["aspect_bucket"])
        counts = np.bincount(codes[~held], minlength=len(names_b)).tolist()
        self.buckets = dict(zip(names_b, counts, strict=True))
        _check_training_left(self.buckets, held_out_samples)
        self.start = dict(zip(names_b, _starts(counts, 0), strict=True))
        held_counts = np.bincount(codes[held], minlength=len(names_b)).tolist()
        self.held_out = range(sum(counts), len(codes))
        first = _starts(held_counts, sum(counts))
        self.held_out_buckets = {
            b: range(low, low + n) for b, low, n in zip(names_b, first, held_counts, strict=True) if n
        }
        self._tars, self._tar = names["tar"], columns["tar"][order]
        self._offset, self._length = columns["offset"][order], columns["length"][order]
        self._id = columns["id"][order]
        self._tier, self._episode = columns["tier"][order], columns["episode_bucket"][order]
        self.cells = {b: self._cells_of(b) for b in names_b}
        self._reader = ShardReader(self.root)

    def __len__(self) -> int:
        """Training samples."""
        return self.held_out.start

    def id(self, row: int) -> str:
        """Content id (hex sha256) of a row."""
        return self._id[row].tobytes().hex()

    def bucket(self, row: int) -> str:
        """Aspect bucket of a row."""
        if row in self.held_out:
            return next(b for b, rows in self.held_out_buckets.items() if row in rows)
        starts = list(self.start.values())
        return list(self.buckets)[int(np.searchsorted(starts, row, side="right")) - 1]

    def tier(self, row: int) -> str | None:
        """Tier of a row, one of `index.TIERS`; None where it has none."""
        return None if self._tier[row] == _NONE else index.TIERS[self._tier[row]]

    def episode(self, row: int) -> str | None:
        """Episode bucket of a row, one of `index.EPISODE_BUCKETS`; None where it has none."""
        return None if self._episode[row] == _NONE else index.EPISODE_BUCKETS[self._episode[row]]

    def _cells_of(self, bucket: str) -> dict[Cell, range]:
        first, count = self.start[bucket], self.buckets[bucket]
        rows = slice(first, first + count)
        changes = np.diff(self._tier[rows]).astype(bool) | np.diff(self._episode[rows]).astype(bool)
        edges = [first, *(first + 1 + np.flatnonzero(changes)).tolist(), first + count]
        return {(self.tier(a), self.episode(a)): range(a, b) for a, b in itertools.pairwise(edges)}

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


def open_corpus(path: str | Path, held_out_samples: int = 0) -> Corpus:
    """Open a data set folder made by ``tools/curate.py`` or ``tools/encode.py``.

    Args:
        held_out_samples: images to keep out of training: those with the smallest ids. An id is a hash of the
            content, so the choice is uniform, and depends neither on the order of the index nor on a seed.

    Raises:
        ConfigError: no such folder, no data set in it, or more held out than training can spare.
        DataError: a file of the data set is missing, shortened, damaged or of an unknown version; names it.
    """
    return Corpus(path, held_out_samples)


def _smallest_ids(ids: np.ndarray, count: int, root: Path) -> np.ndarray:
    """bool [rows]: True for the ``count`` rows with the smallest ids."""
    chosen = np.zeros(len(ids), bool)
    if count < 0 or 2 * count > len(ids):
        raise ConfigError(
            f"--valid-samples {count}: 0 to {len(ids) // 2}, half of the {len(ids)} images of {root}"
        )
    if count:
        first = ids[:, :8].copy().view(">u8").reshape(-1)
        near = np.flatnonzero(first <= np.partition(first, count - 1)[count - 1])
        chosen[near[_id_order(ids[near])[:count]]] = True
    return chosen


def _id_order(ids: np.ndarray) -> np.ndarray:
    """Order that sorts ids (uint8 [n, 32])."""
    words = np.ascontiguousarray(ids).view(">u8")
    return np.lexsort([words[:, i] for i in reversed(range(4))])


def _row_order(columns: dict[str, np.ndarray], codes: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Index positions in the order of the rows: training by (bucket, tier, episode), then held out by (bucket, id)."""
    train, rest = np.flatnonzero(~held), np.flatnonzero(held)
    cells = (columns["episode_bucket"][train], columns["tier"][train], codes[train])
    rest = rest[_id_order(columns["id"][rest])]
    rest = rest[np.argsort(codes[rest], kind="stable")]
    return np.concatenate([train[np.lexsort(cells)], rest])


def _starts(counts: list[int], first: int) -> list[int]:
    return [first, *(first + np.cumsum(counts)[:-1]).tolist()]


def _check_training_left(counts: dict[str, int], held_out_samples: int) -> None:
    empty = [bucket for bucket, count in counts.items() if not count]
    if empty:
        raise ConfigError(
            f"--valid-samples {held_out_samples}: would leave no image of aspect bucket {empty[0]} for training; "
            "give fewer, or curate with a larger --min-bucket-images, so that small buckets join others"
        )


def _load_columns(root: Path, manifest: dict) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Columns of all parts, and the names that the int32 numbers of tar and bucket stand for.

    Tier and episode bucket are int8 positions in `index.TIERS` and `index.EPISODE_BUCKETS`.
    """
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
        for name, allowed in (("tier", index.TIERS), ("episode_bucket", index.EPISODE_BUCKETS)):
            parts[name].append(_codes(table[name], allowed, f"{path}: column {name}"))
    columns = {name: np.concatenate(values) if values else np.empty(0) for name, values in parts.items()}
    if len(columns["offset"]) != manifest["samples"] or not manifest["samples"]:
        raise DataError(
            f"{root}: the index has {len(columns['offset'])} rows, the manifest says {manifest['samples']} "
            "samples; copy the data set again or make it again"
        )
    return columns, {name: list(known) for name, known in numbers.items()}


def _codes(column: pa.ChunkedArray, allowed: tuple[str, ...], label: str) -> np.ndarray:
    """Positions in ``allowed`` as int8, `_NONE` for null."""
    encoded = column.combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    if unknown := sorted(set(names) - set(allowed)):
        raise DataError(
            f"{label} holds {unknown[0]!r}, which is none of {', '.join(allowed)}; curate the images again"
        )
    table = np.array([allowed.index(name) for name in names] + [_NONE], np.int8)
    return table[encoded.indices.fill_null(len(names)).to_numpy()]


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
