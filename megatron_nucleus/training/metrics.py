"""The run's curve: one JSON row per logged step in ``metrics.jsonl``, and the same scalars in TensorBoard.

A resumed run continues one curve: rows of steps after the checkpoint, which the resumed run takes again, are
removed first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nucleus.utils.errors import DataError
from megatron_nucleus.utils.files import write_atomic

# Keys of every row, in this order; a caller may add more.
KEYS = (
    "step",
    "samples_seen",
    "loss",
    "flow_loss",
    "router_z_loss",
    "grad_norm",
    "lr",
    "step_s",
    "samples_per_s",
    "model_tflops_per_device",
    "mfu",
    "skipped",
    "bucket",
    "peak_memory_bytes",
    "timestamp",
)
FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes a run's metrics; use it as a context manager.

    Args:
        run_dir: folder of the run, created if missing.
        step: steps already taken by the checkpoint that this run continues (0 = from the beginning). Rows and
            TensorBoard events of later steps are dropped.
        tensorboard: also write event files under ``run_dir/tensorboard``.

    Raises:
        DataError: an existing ``metrics.jsonl`` cannot be read.
    """

    def __init__(self, run_dir: str | Path, step: int = 0, *, tensorboard: bool = True):
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE_NAME
        _truncate(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides events that an interrupted run wrote beyond its last checkpoint.
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and flush it. NaN and infinities become null and are left out of TensorBoard.

        Values may be mappings of names to values; in TensorBoard these are curves of one group.

        Raises:
            ValueError: a key of `KEYS` is missing.
        """
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"metrics row lacks {', '.join(missing)}")
        ordered = {key: row[key] for key in KEYS} | {k: v for k, v in row.items() if k not in KEYS}
        plain = {key: _plain(value) for key, value in ordered.items()}
        self._file.write(json.dumps(plain, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for tag, value in _scalars(plain):
                self._board.add_scalar(tag, value, plain["step"])

    def histogram(self, tag: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Show counts of len(counts) bins between len(counts) + 1 edges in TensorBoard."""
        if self._board is None or not sum(counts):
            return
        values, middles = np.asarray(counts, float), (np.asarray(edges[:-1]) + np.asarray(edges[1:])) / 2
        self._board.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(values.sum()),
            sum=float((values * middles).sum()),
            sum_squares=float((values * middles**2).sum()),
            bucket_limits=[float(edge) for edge in edges[1:]],
            bucket_counts=values.tolist(),
            global_step=step,
        )

    def image(self, tag: str, picture: Any, step: int) -> None:
        """Show a picture in TensorBoard: a PIL image or a uint8 array [height, width, 3]."""
        if self._board is not None:
            self._board.add_image(tag, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close all files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of every number of a row: ``train/loss``, ``validation/loss_by_sigma/0.0625``."""
    for key, value in row.items():
        group, _, rest = key.partition("_")
        tag = f"validation/{rest}" if group == "valid" else f"train/{key}"
        if key not in ("step", "timestamp"):
            yield from _numbers(tag, value)


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(f"{tag}/{name}", inner)
    elif isinstance(value, (int, float)):
        yield tag, value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a ``metrics.jsonl``; a last line that was cut off by a crash is left out.

    Raises:
        DataError: the file is missing, or a line before the last is no JSON object with a ``step``.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no text; move it away to start a new curve") from error
    unfinished = lines.pop()  # empty when the file ends in a newline
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            raise DataError(
                f"{path}: line {number} is damaged; mend it or move the file away to start a new curve"
            )
        rows.append(row)
    last = _parse(unfinished)
    return rows if last is None else [*rows, last]


def last_loss(run_dir: str | Path, step: int) -> float | None:
    """Loss of the newest row up to ``step``; None where there is no row, or the loss was not finite.

    Raises:
        DataError: ``metrics.jsonl`` cannot be read.
    """
    path = Path(run_dir) / FILE_NAME
    rows = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
    return rows[-1].get("loss") if rows else None


def _parse(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _truncate(path: Path, step: int) -> None:
    """Keep the rows up to ``step``; the file is replaced at once or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _plain(value: Any) -> Any:
    """Numbers as Python numbers (0-d tensors and arrays included), non-finite ones as None, also in mappings."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
