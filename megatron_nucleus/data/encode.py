"""Encode a data set once: a curated folder in, a folder of latents and text features out, ready for the loader.

Works shard by shard. A finished shard leaves a record in ``.progress`` with a hash of all settings, so the same
command goes on after the last one when it was stopped, and another command makes them all again. The same input
and settings give the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_nucleus.data import buckets, images, index
from megatron_nucleus.data.dataset import EMPTY_TEXT_FILE, Corpus, open_corpus, pack_empty_text, pack_features
from megatron_nucleus.data.encoders import LatentCodec, TextEncoder
from megatron_nucleus.data.manifest import claim_output, write_manifest
from megatron_nucleus.data.shards import MAX_SHARD_BYTES, ShardInfo, ShardReader, ShardWriter, encode_json
from megatron_nucleus.data.workers import start_worker
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.devices import DTYPES
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import exclusive, write_atomic, write_json_atomic
from megatron_nucleus.utils.staging import explain_writing

PROGRESS = ".progress"


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """How features are made and stored."""

    encode_batch_size: int = knob(64, "images, and captions, given to the encoders at once", unit="images")
    stored_text_dtype: str = knob(
        "bfloat16", "precision of stored text features; latents are float32", choices=("float32", "bfloat16")
    )
    max_shard_bytes: int = knob(MAX_SHARD_BYTES, "a shard is closed before it passes this", unit="bytes")

    def __post_init__(self) -> None:
        for name in ("encode_batch_size", "max_shard_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"encode.{name}: must be at least 1, got {getattr(self, name)}")


def encode_corpus(
    source: str | Path,
    output: str | Path,
    codec: LatentCodec,
    text_encoder: TextEncoder,
    config: EncodeConfig,
    *,
    resolution_px: int,
    patch_size: int,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Encode every image at its bucket's size and every caption, the empty one once.

    An image that cannot be decoded goes to the quarantine with its reason. Captions longer than the text
    encoder's limit are cut and counted.

    Args:
        source: curated folder. output: new folder, or one that this function left unfinished.
        resolution_px: side of the square bucket. patch_size: latents per token side.
        num_workers: processes that read and decode; 0 = this one.
        progress: called with (images done, images in all).

    Returns:
        ``seen, kept, quarantined {reason: n}, captions, captions_truncated, shards, bytes`` of the whole folder.

    Raises:
        ConfigError: the source is encoded already, a size does not fit, or the output is in use or cannot be written.
        DataError: a file of the source is damaged, names it; or the disk is full.
    """
    corpus, output = open_corpus(source), Path(output)
    if corpus.encoded is not None:
        raise ConfigError(
            f"--data-path {source}: is encoded already; give a folder that tools/curate.py made"
        )
    multiple_px = codec.stride_px * patch_size
    sizes = {bucket: buckets.size(bucket, resolution_px, multiple_px) for bucket in corpus.buckets}
    encoded = {
        "codec": codec.spec(),
        "text_encoder": text_encoder.spec(),
        "resolution_px": resolution_px,
        "patch_size": patch_size,
        "multiple_px": multiple_px,
    }
    settings = {"source": corpus.manifest_hash, **encoded, **dataclasses.asdict(config)}
    if claim_output(output, "encode", settings) != "complete":
        maker = _FeatureMaker(codec, text_encoder, config)
        keeps = "finished shards are kept, and the same command goes on after them"
        with explain_writing(output, keeps), exclusive(output, "--output"):
            (output / PROGRESS).mkdir(exist_ok=True)
            made_with = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            _forget_other_work(output, made_with)
            write_atomic(output / EMPTY_TEXT_FILE, pack_empty_text(maker.texts([""])[0]))
            advance = _adder(progress, len(corpus))
            _encode_shards(corpus, output, maker, sizes, num_workers, advance, made_with)
            _finish(corpus, output, settings, encoded)
    shutil.rmtree(output / PROGRESS, ignore_errors=True)
    manifest = json.loads((output / "manifest.json").read_text())
    size = sum(shard["bytes"] for shard in manifest["shards"])
    return {**manifest["counts"], "shards": len(manifest["shards"]), "bytes": size}


def _encode_shards(
    corpus: Corpus,
    output: Path,
    maker: _FeatureMaker,
    sizes: dict[str, tuple[int, int]],
    num_workers: int,
    advance: Callable[[int], None],
    made_with: str,
) -> None:
    """Make every shard that has no record yet, in the order of their names."""
    parts_of = _parts_by_tar(corpus)
    numbers: Counter[str] = Counter()
    for tar in sorted(parts_of):
        record = _read_record(output, tar)
        if record is not None:
            advance(record["seen"])
        else:
            rows = _rows_of(parts_of[tar], tar)
            bucket = rows[0]["aspect_bucket"]
            if any(row["aspect_bucket"] != bucket for row in rows):
                raise DataError(f"{corpus.root / tar}: holds several aspect buckets; curate the images again")
            writer = _Output(ShardWriter(output, bucket, maker.config.max_shard_bytes, first=numbers[bucket]))
            batches = DataLoader(
                _SampleReader(corpus.root, rows, *sizes[bucket]),
                batch_size=maker.config.encode_batch_size,
                num_workers=num_workers,
                collate_fn=list,
                worker_init_fn=functools.partial(start_worker, parent=os.getpid()),
                generator=torch.Generator(),  # else the global generator is drawn from
            )
            try:
                record = _encode_shard(rows, batches, writer, maker, advance)
            except BaseException:
                writer.shards.abort()
                raise
            _write_record(output, tar, {"made_with": made_with, **record}, writer)
        for shard in record["shards"]:
            numbers[shard["bucket"]] += 1


def _encode_shard(
    rows: list[dict],
    batches: DataLoader,
    writer: _Output,
    maker: _FeatureMaker,
    advance: Callable[[int], None],
) -> dict:
    """Encode one source shard; returns its record."""
    truncated_before = maker.text_encoder.truncated
    seen = captions = 0
    for batch in batches:
        features = iter(maker.samples([sample for sample in batch if sample.pixels is not None]))
        for sample in batch:
            row = rows[seen]
            seen += 1
            if sample.pixels is None:
                writer.quarantine(row, sample)
                continue
            captions += len(sample.info["captions"])
            writer.add(row, {"safetensors": next(features), "json": encode_json(sample.info)})
        advance(len(batch))
    return {
        "seen": seen,
        "captions": captions,
        "captions_truncated": maker.text_encoder.truncated - truncated_before,
        "shards": [info._asdict() for info in writer.shards.close()],
    }


def _finish(corpus: Corpus, output: Path, settings: dict, encoded: dict) -> None:
    """Index, quarantine and manifest from the records of all shards."""
    for name in ("index", "quarantine"):  # of an attempt that was stopped here
        shutil.rmtree(output / name, ignore_errors=True)
    parts = index.ParquetParts(output / "index", index.INDEX_SCHEMA)
    lost = index.ParquetParts(output / "quarantine", index.QUARANTINE_SCHEMA)
    shards, reasons, counts = [], Counter(), Counter()
    for tar in sorted(_parts_by_tar(corpus)):
        record = _read_record(output, tar)
        shards += [ShardInfo(**info) for info in record["shards"]]
        for key in ("seen", "captions", "captions_truncated"):
            counts[key] += record[key]
        stem = _record_stem(output, tar)
        for row in index.iter_rows(stem.with_suffix(".kept"), index.INDEX_SCHEMA):
            parts.add(row)
            counts["kept"] += 1
        for row in index.iter_rows(stem.with_suffix(".lost"), index.QUARANTINE_SCHEMA):
            lost.add(row)
            reasons[row["reason"]] += 1
    if not counts["kept"]:
        raise DataError(
            f"{corpus.root}: no image could be decoded ({dict(reasons)}); curate the images again"
        )
    lost.close()
    write_manifest(
        output,
        tool="encode",
        settings=settings,
        shards=sorted(shards),
        index_files=parts.close(),
        counts={**counts, "rejected": {}, "quarantined": dict(sorted(reasons.items()))},
        encoded=encoded,
        merged_buckets=corpus.manifest.get("merged_buckets"),
    )


@dataclasses.dataclass(frozen=True)
class _Sample:
    """One decoded image. pixels: uint8 [3, H, W], or None with the reason and detail of the failure."""

    info: dict
    pixels: torch.Tensor | None
    reason: str = ""
    detail: str = ""


class _SampleReader(Dataset):
    """Reads and decodes the samples of one shard, in its order."""

    def __init__(self, root: Path, rows: list[dict], width: int, height: int):
        self._reader = ShardReader(root)
        self._places = [(row["tar"], row["offset"], row["length"], row["id"]) for row in rows]
        self._size = (width, height)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> _Sample:
        payload, info = self._reader.read_sample(*self._places[i])
        info.setdefault("captions", [])
        try:
            with images.quiet_decoding():
                pixels = images.load_pixels(payload, *self._size)
        except images.UnusableImage as error:
            return _Sample(info, None, error.reason, error.detail)
        return _Sample(info, torch.from_numpy(pixels.transpose(2, 0, 1).copy()))


class _FeatureMaker:
    """The two encoders, in batches."""

    def __init__(self, codec: LatentCodec, text_encoder: TextEncoder, config: EncodeConfig):
        self.codec, self.text_encoder, self.config = codec, text_encoder, config
        self._dtype = DTYPES[config.stored_text_dtype]

    def samples(self, samples: list[_Sample]) -> list[bytes]:
        """The ``.safetensors`` payload of each sample."""
        if not samples:
            return []
        latents_BCHW = self.codec.encode(torch.stack([s.pixels for s in samples])).float().cpu()
        texts = [[caption["text"] for caption in s.info["captions"]] for s in samples]
        features = iter(self.texts([text for group in texts for text in group]))
        return [
            pack_features(latents_CHW, [next(features) for _ in group])
            for latents_CHW, group in zip(latents_BCHW, texts, strict=True)
        ]

    def texts(self, texts: list[str]) -> list[torch.Tensor]:
        """Features [L, U] of each text, real tokens only."""
        out = []
        for start in range(0, len(texts), self.config.encode_batch_size):
            chunk = texts[start : start + self.config.encode_batch_size]
            features_BLU, mask_BL = self.text_encoder.encode(chunk, truncate=True)
            features_BLU = features_BLU.to(self._dtype).cpu()
            mask = None if mask_BL is None else mask_BL.cpu()
            out += [row if mask is None else row[mask[i]] for i, row in enumerate(features_BLU)]
        return out


class _Output:
    """Shards of one bucket, and the index rows of what they hold."""

    def __init__(self, shards: ShardWriter):
        self.shards = shards
        self.rows: list[dict] = []
        self.lost: list[dict] = []

    def add(self, row: dict, members: dict[str, bytes]) -> None:
        place = self.shards.add(row["id"], members)
        self.rows.append({**row, "tar": place.tar, "offset": place.offset, "length": place.length})

    def quarantine(self, row: dict, sample: _Sample) -> None:
        self.lost.append(
            {
                "item": row["source_id"],
                "verdict": "quarantined",
                "reason": sample.reason,
                "detail": sample.detail,
                "stage": "encode",
                "container": row["tar"].encode(),
                "offset": row["offset"],
                "length": row["length"],
                "width_px": row["width_px"],
                "height_px": row["height_px"],
                "sha256": row["id"],
            }
        )


def _parts_by_tar(corpus: Corpus) -> dict[str, list[Path]]:
    """Tar -> index files that have rows of it."""
    found: dict[str, list[Path]] = {}
    for entry in corpus.manifest["index"]:
        path = corpus.root / entry["path"]
        with index.open_parquet(path, index.INDEX_SCHEMA) as file:
            for tar in sorted(set(file.read(columns=["tar"])["tar"].to_pylist())):
                found.setdefault(tar, []).append(path)
    return found


def _rows_of(parts: list[Path], tar: str) -> list[dict]:
    """Index rows of one tar in the order of their offsets."""
    rows = []
    for path in parts:
        for row in pq.read_table(path, filters=[("tar", "=", tar)], schema=index.INDEX_SCHEMA).to_pylist():
            if row["stage_versions"] is not None:
                row["stage_versions"] = dict(row["stage_versions"])
            rows.append(row)
    return sorted(rows, key=lambda row: row["offset"])


def _record_stem(output: Path, tar: str) -> Path:
    return output / PROGRESS / Path(tar).stem


def _forget_other_work(output: Path, made_with: str) -> None:
    """Remove records of other settings, and shards that no record names: of those settings, or half written."""
    ours = set()
    for path in (output / PROGRESS).glob("*.json"):
        record = json.loads(path.read_text())
        if record.get("made_with") == made_with:
            ours.update(shard["tar"] for shard in record["shards"])
        else:
            path.unlink()
    for path in (output / "shards").glob("*"):
        if f"shards/{path.name}" not in ours:
            path.unlink()


def _write_record(output: Path, tar: str, record: dict, writer: _Output) -> None:
    """Rows first, the record last: it says that the shard is finished."""
    stem = _record_stem(output, tar)
    for suffix, rows, schema in (
        (".kept", writer.rows, index.INDEX_SCHEMA),
        (".lost", writer.lost, index.QUARANTINE_SCHEMA),
    ):
        table = pa.Table.from_pylist(rows, schema=index.tagged(schema))
        index.write_table(table, stem.with_suffix(suffix))
    write_json_atomic(stem.with_suffix(".json"), record)


def _read_record(output: Path, tar: str) -> dict | None:
    """The record of a finished shard, or None when it must be made (again)."""
    path = _record_stem(output, tar).with_suffix(".json")
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    whole = all(
        (output / s["tar"]).is_file() and (output / s["tar"]).stat().st_size == s["bytes"]
        for s in record["shards"]
    )
    return record if whole else None


def _adder(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """A callable that adds to the images done and reports the sum."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return advance
