"""Average the weights of the last checkpoints instead of decaying the learning rate (Warmup-Stable-Merge).

Source: arXiv 2507.17634; Nucleus-Image releases the average of its last 16 checkpoints with inverse-square-root
weights (its release blog). How that formula counts is not published; ours is in `merge_weights`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_nucleus.data.encoders import same_encoder
from megatron_nucleus.export import native
from megatron_nucleus.export.convert import (
    DEFAULT_SHARD_BYTES,
    Progress,
    byte_counter,
    native_state,
    write_native_files,
)
from megatron_nucleus.export.safetensors_stream import SafetensorsStream
from megatron_nucleus.export.source import CheckpointDescription, Weights, open_checkpoint
from megatron_nucleus.export.tensor_store import row_ranges
from megatron_nucleus.utils.errors import ConfigError, DataError, nearest
from megatron_nucleus.utils.memory import peak_memory_bytes
from megatron_nucleus.utils.staging import check_free, staged_folder

SCHEMES = ("inverse_sqrt", "uniform", "ema")
DEFAULT_EMA_DECAY = 0.9
_PIECE_BYTES = (
    2 << 20
)  # of one input; its fp64 copy, the accumulator and temporaries take about ten times that


def merge_weights(scheme: str, count: int, ema_decay: float = DEFAULT_EMA_DECAY) -> list[float]:
    """Weights of ``count`` checkpoints, oldest first, summing to 1. The k-th newest (k = 1 is the newest) has

        inverse_sqrt   a weight proportional to 1/sqrt(k)
        uniform        1/count
        ema            a weight proportional to ema_decay**(k-1): what an exponential moving average holds that was
                       updated once at every checkpoint, started at zero, and divided by its total weight
                       1 - ema_decay**count

    Args:
        ema_decay: in (0, 1), decay from one checkpoint to the next (not from step to step).

    Raises:
        ConfigError: unknown scheme, or a value out of range.
    """
    if scheme not in SCHEMES:
        raise ConfigError(
            f"--weights {scheme}: unknown{nearest(scheme, SCHEMES)}; one of: {', '.join(SCHEMES)}"
        )
    if count < 1:
        raise ConfigError(f"--last {count}: must be at least 1")
    if not 0.0 < ema_decay < 1.0:
        raise ConfigError(f"--ema-decay {ema_decay}: must lie between 0 and 1, both excluded")
    ages = range(count, 0, -1)
    raw = {
        "inverse_sqrt": [1.0 / math.sqrt(k) for k in ages],
        "uniform": [1.0 for _ in ages],
        "ema": [ema_decay ** (k - 1) for k in ages],
    }[scheme]
    total = math.fsum(raw)
    return [w / total for w in raw]


def select_checkpoints(checkpoints: str | Path, last: int | None, steps: Sequence[int] | None) -> list[Path]:
    """Step folders to merge, oldest first: the ``last`` newest ones, or exactly those of ``steps``.

    The newest is the one that ``latest`` names: a run that went back to it left the later ones behind.

    Raises:
        ConfigError: no checkpoints there, fewer than ``last``, an unknown or repeated step, or not exactly one of
            ``last`` and ``steps``.
        DataError: ``latest`` is damaged and ``last`` is asked for.
    """
    checkpoints = Path(checkpoints)
    folder = native.checkpoints_folder(checkpoints)
    found = native.list_steps(folder) if folder else []
    if not found:
        raise ConfigError(
            f"--checkpoints {checkpoints}: holds no step_* folders; name a run folder or its checkpoints"
        )
    if (last is None) == (steps is None):
        raise ConfigError("give exactly one of --last N and --steps STEP ...")
    if last is not None:
        if last < 1:
            raise ConfigError(f"--last {last}: must be at least 1")
        branch = native.list_branch(folder)
        if last > len(branch):
            until = f" up to {branch[-1].name}, which latest names" if len(branch) < len(found) else ""
            raise ConfigError(f"--last {last}: only {len(branch)} checkpoints exist in {folder}{until}")
        return branch[-last:]
    by_step = {native.step_number(p): p for p in found}
    for step in steps:
        if step not in by_step:
            raise ConfigError(f"--steps {step}: no such checkpoint; there are {', '.join(map(str, by_step))}")
    if not steps or len(set(steps)) != len(steps):
        raise ConfigError(f"--steps {' '.join(map(str, steps))}: name at least one step, each once")
    return [by_step[step] for step in sorted(steps)]


def merge(
    checkpoints: str | Path,
    output: str | Path,
    scheme: str = "inverse_sqrt",
    *,
    last: int | None = None,
    steps: Sequence[int] | None = None,
    ema_decay: float = DEFAULT_EMA_DECAY,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    checksums: bool = True,
    progress: Progress | None = None,
) -> dict:
    """Write the weighted average of checkpoints as a native checkpoint (model/, state.json, manifest.json).

    Sums run in fp64, a few megabytes of every input at a time, oldest checkpoint first; the result has the
    inputs' dtype. One checkpoint gives its own bits.

    Args:
        checkpoints: run folder or checkpoints folder.
        output: new (or empty) folder.
        scheme, ema_decay: see `merge_weights`. last, steps: see `select_checkpoints`.
        checksums: see `open_checkpoint`.
        progress: called with (bytes done, bytes in all) of the output.

    Returns:
        {"inputs" (paths, oldest first), "weights" (same order), "bytes", "peak_memory_bytes",
        "largest_tensor_bytes", "output"}.

    Raises:
        ConfigError: see `merge_weights` and `select_checkpoints`; output not empty or not writable.
        DataError: a damaged input, inputs of different models or encoders, a value that is not finite, full disk.
    """
    output = Path(output)
    check_free(output)
    folders = select_checkpoints(checkpoints, last, steps)
    factors = merge_weights(scheme, len(folders), ema_decay)
    opened = [open_checkpoint(folder, checksums) for folder in folders]
    for other in opened[:-1]:
        _check_same_model(opened[-1], other)
    description, newest = opened[-1]
    entries = {name: newest.info(name) for name in newest.keys}
    total = sum(info.nbytes for info in entries.values())
    merged = {"scheme": scheme, "inputs": [str(f) for f in folders], "weights": factors}
    if scheme == "ema":
        merged["ema_decay"] = ema_decay
    with staged_folder(output, needed_bytes=total) as staging:
        (staging / "model").mkdir()
        inputs = [weights for _, weights in opened]
        with SafetensorsStream(staging / "model", "model", entries, max_shard_bytes) as stream:
            _average(stream, inputs, factors, byte_counter(progress, total))
        write_native_files(staging, native_state(description, {"merged": merged}), stream.files)
    return {
        "inputs": merged["inputs"],
        "weights": factors,
        "bytes": total,
        "peak_memory_bytes": peak_memory_bytes(),
        "largest_tensor_bytes": max(info.nbytes for info in entries.values()),
        "output": str(output),
    }


def _average(
    stream: SafetensorsStream, inputs: list[Weights], factors: list[float], count: Callable[[int], None]
) -> None:
    for name in stream.order:
        info = inputs[0].info(name)
        for low, high in row_ranges(info, 0, info.shape[0], _PIECE_BYTES):
            rows = _weighted_sum(name, inputs, factors, low, high)
            stream.write(name, rows)
            count(rows.numel() * rows.element_size())


def _weighted_sum(name: str, inputs: list[Weights], factors: list[float], low: int, high: int) -> Tensor:
    """Rows ``low:high`` of the average, in the inputs' dtype."""
    total = None
    for weights, factor in zip(inputs, factors, strict=True):
        rows = weights.read_rows(name, low, high)
        if not bool(rows.isfinite().all()):
            raise DataError(
                f"{weights.file(name)}: tensor {name} holds values that are not finite; leave this checkpoint out "
                "(--steps names the ones to merge)"
            )
        term = rows.to(torch.float64).mul_(factor)
        total = term if total is None else total.add_(term)
    return total.to(rows.dtype)


def _check_same_model(
    a: tuple[CheckpointDescription, Weights], b: tuple[CheckpointDescription, Weights]
) -> None:
    for what, same in (("shape", operator.eq), ("codec", same_encoder), ("text_encoder", same_encoder)):
        if not same(getattr(a[0], what), getattr(b[0], what)):
            raise DataError(
                f"{b[0].path / 'state.json'}: another {_WORDS[what]} than {a[0].path}; merge checkpoints of one run"
            )
    for name in a[1].keys:
        if a[1].info(name) != b[1].info(name):
            raise DataError(
                f"{b[1].file(name)}: tensor {name} is {b[1].info(name).dtype}, in {a[0].path} it is "
                f"{a[1].info(name).dtype}; merge checkpoints of one run"
            )


_WORDS = {"shape": "architecture", "codec": "latent codec", "text_encoder": "text encoder"}
