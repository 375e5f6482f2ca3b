"""Native checkpoint <-> diffusers folder, exact in both directions, streaming a few megabytes at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_nucleus.export import hf_keys, native
from megatron_nucleus.export.safetensors_header import TensorInfo
from megatron_nucleus.export.safetensors_stream import SafetensorsStream
from megatron_nucleus.export.source import (
    INDEX_NAME,
    SIDE_FILE,
    WEIGHTS_NAME,
    CheckpointDescription,
    Weights,
    open_checkpoint,
    swapped_ranges,
)
from megatron_nucleus.export.tensor_store import row_ranges
from megatron_nucleus.utils.devices import DTYPES
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import write_json_atomic
from megatron_nucleus.utils.memory import peak_memory_bytes
from megatron_nucleus.utils.staging import check_free, staged_folder

DEFAULT_SHARD_BYTES = 5 * 10**9  # as diffusers and transformers cut their files

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def convert(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    checksums: bool = True,
    progress: Progress | None = None,
) -> dict:
    """Write the weights of ``source`` as a diffusers folder or as a native checkpoint.

    Without ``dtype`` every value keeps its bits and its dtype. ``output`` appears when it is complete.

    Args:
        source: anything `open_checkpoint` opens.
        output: new (or empty) folder.
        to: ``hf`` (config.json, safetensors shards, index, nucleus.json) or ``native`` (model/, state.json,
            manifest.json; no optimizer state).
        max_shard_bytes: limit of one file's tensor data.
        dtype: ``float32``, ``bfloat16`` or ``float16`` to convert to; None keeps what is stored.
        checksums: see `open_checkpoint`.
        progress: called after every slice.

    Returns:
        {"tensors", "bytes", "parameters", "peak_memory_bytes", "wall_s", "largest_tensor_bytes", "shards",
        "output"}; bytes counts tensor data, peak memory is the process's.

    Raises:
        ConfigError: bad target, output not empty or not writable, source not found, an architecture that diffusers
            does not have.
        DataError: damaged source, a value that ``dtype`` cannot hold, full disk.
    """
    started = time.perf_counter()
    output = Path(output)
    if to not in ("hf", "native"):
        raise ConfigError(f"--to {to}: expected hf or native")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    check_free(output)
    description, weights = open_checkpoint(source, checksums)
    if to == "hf":
        hf_keys.check_expressible(description.shape)  # before gigabytes are written
    target = DTYPES[dtype] if dtype else None
    entries = {
        (key.diffusers if to == "hf" else name): TensorInfo(key.shape, target or weights.info(name).dtype)
        for name, key in weights.keys.items()
    }
    total = sum(info.nbytes for info in entries.values())
    with staged_folder(output, needed_bytes=total) as staging:
        write = _write_diffusers if to == "hf" else _write_native
        shards = write(staging, description, weights, entries, max_shard_bytes, byte_counter(progress, total))
    return {
        "tensors": len(entries),
        "bytes": total,
        "parameters": sum(info.numel for info in entries.values()),
        "peak_memory_bytes": peak_memory_bytes(),
        "wall_s": time.perf_counter() - started,
        "largest_tensor_bytes": max(info.nbytes for info in entries.values()),
        "shards": shards,
        "output": str(output),
    }


def _write_diffusers(
    folder: Path,
    description: CheckpointDescription,
    weights: Weights,
    entries: dict[str, TensorInfo],
    max_shard_bytes: int,
    count: Callable[[int], None],
) -> int:
    by_diffusers = {key.diffusers: key for key in weights.keys.values()}
    with SafetensorsStream(folder, WEIGHTS_NAME, entries, max_shard_bytes, INDEX_NAME) as stream:
        for name in stream.order:
            key = by_diffusers[name]
            rows = key.shape[0]
            ranges = swapped_ranges(rows, 0, rows) if key.swap_halves else [(0, rows)]
            _copy(stream, name, weights, key.native, ranges, entries[name].dtype, count)
    write_json_atomic(folder / "config.json", hf_keys.to_diffusers_config(description.shape))
    side = {
        "format": native.FORMAT,
        "codec": description.codec,
        "text_encoder": description.text_encoder,
        "sampling": description.sampling,
        "provenance": {"step": description.step, **description.provenance, "source": str(description.path)},
    }
    write_json_atomic(folder / SIDE_FILE, side)
    return len(stream.files) - 1


def _write_native(
    folder: Path,
    description: CheckpointDescription,
    weights: Weights,
    entries: dict[str, TensorInfo],
    max_shard_bytes: int,
    count: Callable[[int], None],
) -> int:
    (folder / "model").mkdir()
    with SafetensorsStream(folder / "model", "model", entries, max_shard_bytes) as stream:
        for name in stream.order:
            _copy(stream, name, weights, name, [(0, entries[name].shape[0])], entries[name].dtype, count)
    state = native_state(description, {"source": str(description.path)})
    write_native_files(folder, state, stream.files)
    return len(stream.files)


def native_state(description: CheckpointDescription, extra: dict) -> dict:
    """``state.json`` of weights that were not written by training: provenance of the source plus ``extra``."""
    state = {"step": description.step or 0, "samples_seen": 0, "skipped": 0, **description.provenance}
    return {
        "format": native.FORMAT,
        **state,
        "model": native.shape_to_dict(description.shape),
        "codec": description.codec,
        "text_encoder": description.text_encoder,
        "sampling": description.sampling,
        **extra,
    }


def write_native_files(folder: Path, state: dict, model_files: dict[str, dict]) -> None:
    """Write state.json and manifest.json of a checkpoint whose ``model/`` files are already described."""
    write_json_atomic(folder / "state.json", state)
    files = {f"model/{name}": entry for name, entry in model_files.items()}
    files["state.json"] = native.describe_file(folder / "state.json")
    native.write_manifest(folder, files)


def _copy(
    stream: SafetensorsStream,
    name: str,
    weights: Weights,
    native_name: str,
    ranges: list[tuple[int, int]],
    dtype: torch.dtype,
    count: Callable[[int], None],
) -> None:
    """Stream the given native row ranges of one tensor."""
    info = weights.info(native_name)
    for start, stop in ranges:
        for low, high in row_ranges(info, start, stop):
            rows = weights.read_rows(native_name, low, high)
            if rows.dtype != dtype:
                rows = _cast(rows, dtype, f"{weights.file(native_name)}: tensor {native_name}")
            stream.write(name, rows)
            count(rows.numel() * rows.element_size())


def _cast(rows: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    out = rows.to(dtype)
    lost = rows.isfinite() & ~out.isfinite()
    if bool(lost.any()):
        worst = rows[lost].abs().max().item()
        raise DataError(f"{what} holds {worst:g}, more than {dtype} can hold; convert to bfloat16 or float32")
    return out


def byte_counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Turn (bytes done, bytes in all) progress into a callable that is told how many bytes came in addition."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return count
