"""Average the weights of a window of checkpoints instead of decaying the learning rate (Warmup-Stable-Merge).

Source: arXiv 2507.17634; Nucleus-Image releases the average of its last 16 checkpoints with inverse-square-root
weights (its release blog). The weights, and the decay that each choice imitates: `merge_weights.py`.

All checkpoints of a window are of one run: of one seed, one data set and one start, none of which a run can change.
What it can change when it goes on (learning rate, losses, batch, curriculum, code) may differ within the window. Two
runs are refused even where their shapes fit: where no steps lead from one to the other the average imitates no
decay, and of two initialisations it is noise. A run that started from another one's weights, on other data say, is a
run of its own: its window begins after its start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
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
from megatron_nucleus.export.merge_weights import DEFAULT_EMA_DECAY, decay_of, merge_weights
from megatron_nucleus.export.safetensors_stream import SafetensorsStream
from megatron_nucleus.export.source import CheckpointDescription, Weights, open_checkpoint
from megatron_nucleus.export.tensor_store import row_ranges
from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.memory import peak_memory_bytes
from megatron_nucleus.utils.staging import check_free, staged_folder

_PIECE_BYTES = (
    2 << 20
)  # of one input; its fp64 copy, the accumulator and temporaries take about ten times that


def select_checkpoints(
    checkpoints: str | Path, last: int | None, steps: Sequence[int] | None, until: int | None = None
) -> list[Path]:
    """Step folders to merge, oldest first: ``last`` of them up to step ``until``, or exactly those of ``steps``.

    Without ``until`` the newest is the one that ``latest`` names: a run that went back to it left the later ones
    behind. Folders whose optimizer state was dropped count like any other.

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
        return _window(folder, found, last, until)
    if until is not None:
        raise ConfigError(f"--until {until}: only with --last N, not with --steps")
    by_step = {native.step_number(p): p for p in found}
    for step in steps:
        if step not in by_step:
            raise ConfigError(f"--steps {step}: no such checkpoint; there are {_listed(by_step)}")
    if not steps or len(set(steps)) != len(steps):
        raise ConfigError(f"--steps {' '.join(map(str, steps))}: name at least one step, each once")
    return [by_step[step] for step in sorted(steps)]


def _window(folder: Path, found: list[Path], last: int, until: int | None) -> list[Path]:
    if last < 1:
        raise ConfigError(f"--last {last}: must be at least 1")
    branch = native.list_branch(folder)
    numbers = [native.step_number(step) for step in branch]
    end = f" up to {branch[-1].name}, which latest names" if len(branch) < len(found) else ""
    if until is not None:
        if until not in numbers:
            raise ConfigError(f"--until {until}: no such checkpoint{end}; there are {_listed(numbers)}")
        branch, end = branch[: numbers.index(until) + 1], f" up to step {until}"
    if last > len(branch):
        raise ConfigError(f"--last {last}: only {len(branch)} checkpoints exist in {folder}{end}")
    return branch[-last:]


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))


def merge(
    checkpoints: str | Path,
    output: str | Path,
    scheme: str = "inverse_sqrt",
    *,
    last: int | None = None,
    until: int | None = None,
    steps: Sequence[int] | None = None,
    ema_decay: float | None = None,
    weight_values: Sequence[float] | None = None,
    decay_multipliers: Sequence[float] | None = None,
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
        scheme, ema_decay, weight_values, decay_multipliers: see `merge_weights`.
        last, until, steps: see `select_checkpoints`.
        checksums: see `open_checkpoint`.
        progress: called with (bytes done, bytes in all) of the output.

    Returns:
        {"scheme", "inputs" (paths, oldest first), "weights" and "decay_multipliers" (same order; see `decay_of`)},
        which stand in state.json as ``merged``, and {"bytes", "largest_tensor_bytes", "peak_memory_bytes", "output"}.

    Raises:
        ConfigError: see `merge_weights` and `select_checkpoints`; output not empty or not writable.
        DataError: a damaged input, inputs of different models, encoders or runs, a value that is not finite, full disk.
    """
    output = Path(output)
    check_free(output)
    folders = select_checkpoints(checkpoints, last, steps, until)
    factors = merge_weights(
        scheme,
        [native.step_number(folder) for folder in folders],
        ema_decay=ema_decay,
        weight_values=weight_values,
        decay_multipliers=decay_multipliers,
    )
    merged = {
        "scheme": scheme,
        "inputs": [str(f) for f in folders],
        "weights": factors,
        "decay_multipliers": decay_of(factors),
    }
    if scheme == "ema":
        merged["ema_decay"] = DEFAULT_EMA_DECAY if ema_decay is None else ema_decay
    sizes = _write_average(
        output, [open_checkpoint(folder, checksums) for folder in folders], merged, max_shard_bytes, progress
    )
    return {**merged, **sizes, "peak_memory_bytes": peak_memory_bytes(), "output": str(output)}


def _write_average(
    output: Path,
    opened: list[tuple[CheckpointDescription, Weights]],
    merged: dict,
    max_shard_bytes: int,
    progress: Progress | None,
) -> dict:
    """Check that the inputs fit each other, then write; ``merged`` is what state.json says of the average."""
    for other in opened[:-1]:
        _check_same_model(opened[-1], other)
        _check_same_run(opened[-1][0], other[0])
    description, newest = opened[-1]
    entries = {name: newest.info(name) for name in newest.keys}
    total = sum(info.nbytes for info in entries.values())
    with staged_folder(output, needed_bytes=total) as staging:
        (staging / "model").mkdir()
        inputs = [weights for _, weights in opened]
        with SafetensorsStream(staging / "model", "model", entries, max_shard_bytes) as stream:
            _average(stream, inputs, merged["weights"], byte_counter(progress, total))
        write_native_files(staging, native_state(description, {"merged": merged}), stream.files)
    return {"bytes": total, "largest_tensor_bytes": max(info.nbytes for info in entries.values())}


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
    newest, other = a[0], b[0]
    for field in dataclasses.fields(newest.shape):
        ours, theirs = getattr(newest.shape, field.name), getattr(other.shape, field.name)
        if ours != theirs:
            raise DataError(
                f"{other.path / 'state.json'}: another architecture than {newest.path}: model.{field.name} is "
                f"{theirs}, there {ours}; merge checkpoints of one run"
            )
    for what, words in (("codec", "latent codec"), ("text_encoder", "text encoder")):
        if not same_encoder(getattr(newest, what), getattr(other, what)):
            raise DataError(
                f"{other.path / 'state.json'}: another {words} ({what}) than {newest.path}; "
                "merge checkpoints of one run"
            )
    for name in a[1].keys:
        if a[1].info(name) != b[1].info(name):
            raise DataError(
                f"{b[1].file(name)}: tensor {name} is {b[1].info(name).dtype}, in {a[0].path} it is "
                f"{a[1].info(name).dtype}; merge checkpoints of one run"
            )


def _check_same_run(newest: CheckpointDescription, other: CheckpointDescription) -> None:
    """What stays as it was for as long as a run goes on: see `restore` and `FROZEN_KEYS` of the training."""
    ours, theirs = newest.provenance, other.provenance
    for what, value in (
        ("seed", lambda stored: stored.get("seed")),
        ("data set (data.manifest_hash)", lambda stored: (stored.get("data") or {}).get("manifest_hash")),
        ("start (started_from)", lambda stored: stored.get("started_from")),
    ):
        if value(ours) != value(theirs):
            raise DataError(
                f"{other.path / 'state.json'}: of another run than {newest.path}: its {what} is "
                f"{_short(value(theirs))}, there {_short(value(ours))}; merge checkpoints of one run (--steps names "
                "them)"
            )


def _short(value: object) -> str:
    """A value of state.json for a message; of a start what tells it from another one."""
    if not isinstance(value, dict):
        return str(value)
    known = {key: value.get(key) for key in ("path", "step", "manifest_sha256", "optimizer")}
    return ", ".join(f"{key} {text}" for key, text in known.items())
