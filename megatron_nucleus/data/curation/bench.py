"""What the first stage costs beside the decode that it cannot do without, and what packing costs by itself."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_nucleus.data import images
from megatron_nucleus.data.curation import measures, pack, readers, recipe
from megatron_nucleus.data.curation.engines import EngineConfig, open_engine
from megatron_nucleus.data.curation.pipeline import STAGES
from megatron_nucleus.data.curation.runner import Run
from megatron_nucleus.data.curation.settings import Settings
from megatron_nucleus.data.curation.stage import Drop, PayloadSource, Row
from megatron_nucleus.data.curation.stages.inspect import InspectConfig, inspect
from megatron_nucleus.data.curation.store import Store
from megatron_nucleus.utils.errors import ConfigError


class _InMemory(Row):
    """A row whose bytes are in memory already, so that both loops do the same reading: none."""

    def __init__(self, name: str, payload: bytes):
        values = {"item": name, "container": b"", "offset": None, "length": len(payload)}
        values |= {"sidecars": [], "problem": None, "given": None}
        super().__init__(values, PayloadSource("", len(payload), images.PILLOW_MAX_PIXELS))
        self._payload = payload


def inspect_ratio(
    files: Sequence[bytes], rounds: int = 9, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Time of the whole ``inspect`` stage over that of the bare loop ``Image.open; draft; load``, for the same JPEGs.

    The two take turns on a few files at a time, as many as the stage takes at once, and of each such batch the median
    over the rounds counts, for each of the two: what else the machine does slows a round of both, and both medians
    leave it out. All three figures come from the sums of these medians, so the ratio is that of the two rates.

    Args:
        files: JPEGs, as bytes. rounds: how often each file is decoded by each.
        clock: seconds; ``time.process_time`` counts the time of this process on a processor alone.

    Returns:
        ``bare_images_per_s`` and ``inspect_images_per_s`` of one core, ``ratio`` of the first to the second,
        ``files``, ``rounds``, ``mean_bytes``.

    Raises:
        ConfigError: a file that is no JPEG, or that the stage drops; no file at all, or no round.
    """
    if not files:
        raise ConfigError("inspect_ratio: no files; give JPEGs")
    if rounds < 1:
        raise ConfigError(f"inspect_ratio: rounds {rounds}; at least 1")
    rows = inspect.batch_rows
    batches = [list(files[at : at + rows]) for at in range(0, len(files), rows)]
    for number, batch in enumerate(batches):
        _check(batch, number * rows)
    times = [
        [(_timed(clock, _bare, batch), _timed(clock, _stage, batch)) for batch in batches]
        for _ in range(rounds)
    ]
    bare_s, stage_s = (float(total) for total in np.median(times, axis=0).sum(axis=0))
    return {
        "ratio": stage_s / bare_s,
        "bare_images_per_s": len(files) / bare_s,
        "inspect_images_per_s": len(files) / stage_s,
        "files": len(files),
        "rounds": rounds,
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


def pack_again(source: Path, output: Path, folder: Path, workers: int) -> dict[str, float]:
    """Write the shards of a finished data set again, and say how long that took.

    Twice, and the second time counts: in curation, too, packing finds the workers running and its input read before.

    Args:
        source, output: what `pipeline.curate` was given, with the default settings. folder: new, for the shards.
        workers: processes.

    Returns:
        ``images``, ``bytes`` of all tars, ``wall_s``.
    """
    settings = Settings(engine=EngineConfig(workers=workers))
    lines = recipe.resolve(settings.recipe, settings.stage_sections())
    shutil.copytree(output / STAGES, folder / STAGES, ignore=shutil.ignore_patterns(f"*-{pack.PACK}"))
    limits = settings.curation
    with contextlib.closing(open_engine(settings.engine)) as engine:
        run = Run(
            store=Store(str(folder / STAGES), recipe.levels(lines)),
            parts=tuple(task.name for task in readers.scan(source, settings.readers).tasks),
            engine=engine,
            source=PayloadSource(str(source.absolute()), limits.max_file_bytes, limits.max_pixels),
            retry=False,
            lines=lines,
        )
        for _ in range(2):
            shutil.rmtree(folder / "shards", ignore_errors=True)
            start_s = time.perf_counter()
            packed = pack.pack_all(folder, run, limits, {line.name: "" for line in lines})
            wall_s = time.perf_counter() - start_s
    infos = [one.shard for one in packed.shards]
    return {
        "images": sum(info.samples for info in infos),
        "bytes": sum(info.bytes for info in infos),
        "wall_s": wall_s,
    }
