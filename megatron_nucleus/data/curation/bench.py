"""How much the first stage costs beside the decode that it cannot do without."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence

from PIL import Image

from megatron_nucleus.data import images
from megatron_nucleus.data.curation import measures
from megatron_nucleus.data.curation.stage import Drop, PayloadSource, Row
from megatron_nucleus.data.curation.stages.inspect import InspectConfig, inspect
from megatron_nucleus.utils.errors import ConfigError


class _InMemory(Row):
    """A row whose bytes are in memory already, so that both loops do the same reading: none."""

    def __init__(self, name: str, payload: bytes):
        values = {"item": name, "container": b"", "offset": None, "length": len(payload)}
        values |= {"sidecars": [], "problem": None, "given": None}
        super().__init__(values, PayloadSource("", len(payload), images.PILLOW_MAX_PIXELS))
        self._payload = payload


def inspect_ratio(files: Sequence[bytes], rounds: int = 9, cpu_time: bool = False) -> dict[str, float]:
    """Time of the whole ``inspect`` stage over that of the bare loop ``Image.open; draft; load``, for the same JPEGs.

    The two take turns on a few files at a time, as many as the stage takes at once, and the ratio is the median over
    all turns: a machine that is busy with other things slows both.

    Args:
        files: JPEGs, as bytes. rounds: how often each file is decoded by each.
        cpu_time: count the time of this process on a processor instead of the time on the wall.

    Returns:
        ``ratio``, ``bare_images_per_s`` and ``inspect_images_per_s`` of one core, ``files``, ``mean_bytes``.

    Raises:
        ConfigError: a file that is no JPEG, or that the stage drops; no file at all.
    """
    if not files:
        raise ConfigError("inspect_ratio: no files; give JPEGs")
    clock = time.process_time if cpu_time else time.perf_counter
    rows = inspect.batch_rows
    batches = [list(files[at : at + rows]) for at in range(0, len(files), rows)]
    for number, batch in enumerate(batches):
        _check(batch, number * rows)
    times = [
        (_timed(clock, _bare, batch), _timed(clock, _stage, batch))
        for _ in range(rounds)
        for batch in batches
    ]
    bare_s, stage_s = (rounds * len(files) / sum(column) for column in zip(*times, strict=True))
    return {
        "ratio": statistics.median(stage / bare for bare, stage in times),
        "bare_images_per_s": bare_s,
        "inspect_images_per_s": stage_s,
        "files": len(files),
        "mean_bytes": sum(map(len, files)) / len(files),
    }


def _timed(
    clock: Callable[[], float], work: Callable[[Sequence[bytes]], object], batch: Sequence[bytes]
) -> float:
    start = clock()
    work(batch)
    return clock() - start


def _bare(batch: Sequence[bytes]) -> None:
    for payload in batch:
        image = Image.open(io.BytesIO(payload))
        image.draft(image.mode, measures.draft_size(image.size))
        image.load()


def _stage(batch: Sequence[bytes]) -> Sequence[object]:
    rows = [_InMemory(f"{number}.jpg", payload) for number, payload in enumerate(batch)]
    return inspect.function(rows, InspectConfig(require_captions=False))


def _check(batch: Sequence[bytes], first: int) -> None:
    for number, (payload, result) in enumerate(zip(batch, _stage(batch), strict=True), first):
        if isinstance(result, Drop):
            raise ConfigError(f"inspect_ratio: file {number} is dropped ({result.reason}: {result.detail})")
        if images.sniff(payload[:32]) != "JPEG":
            raise ConfigError(f"inspect_ratio: file {number} is no JPEG; only they are decoded at a fraction")
