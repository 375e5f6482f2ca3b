"""Tile sizes measured on a GPU: ``tuned/<hardware>.json`` beside this file, written by tools/tune_ops.py.

Which tile a kernel gets: the one of this hardware's file for the operation and shape class, else the default written
beside the kernel. One log line per operation and shape class says which.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path
from typing import NamedTuple

import torch
import triton

FOLDER = Path(__file__).with_name("tuned")
KEYS = ("hardware", "versions", "tiles", "seconds")
_log = logging.getLogger(__name__)


class Tile(NamedTuple):
    """How a kernel cuts its work.

    rows, columns: of the results that one program makes. depth: values of the summed dimension read at a time, 1 for
    a kernel that sums none. warps: of 32 threads. stages: reads of a loop that are under way together.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Largest value of each field: a tile's sides are at most 1024 (own choice), a block has at most 32 warps (CUDA),
# and 8 stages of any tile here exceed the shared memory of a block.
LIMITS = Tile(1024, 1024, 1024, 32, 8)
# A product on tensor cores has sides of at least 16; other kernels take any tile.
PRODUCTS = ("expert_ffn", "symmetric_product")
LEAST_OF_PRODUCTS = Tile(16, 16, 16, 1, 1)
LEAST = Tile(1, 1, 1, 1, 1)


@functools.cache
def hardware_name(device: torch.device) -> str:
    """What a tuned file is named after: the GPU's name as in ``nvidia_h200``, or the device type."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def shape_class(dtype: torch.dtype, *, about: dict[str, int], exactly: dict[str, int]) -> str:
    """Name of a class of shapes that share a tile.

    Args:
        about: sizes that follow the batch; rounded up to a power of two.
        exactly: sizes that follow the architecture.

    Returns:
        Such as ``bfloat16 N<=8192 D=2048 F=1344``.
    """
    rounded = [f"{name}<={triton.next_power_of_2(max(1, size))}" for name, size in about.items()]
    return " ".join(
        [
            str(dtype).removeprefix("torch."),
            *rounded,
            *(f"{name}={size}" for name, size in exactly.items()),
        ]
    )


@functools.cache  # hundreds of launches a step ask; a choice is logged when it is made, once
def pick(op: str, shape: str, default: Tile, device: torch.device) -> Tile:
    """The tile for ``op`` on a shape class (`shape_class`).

    Raises:
        ValueError: the file of this hardware is damaged.
    """
    hardware = hardware_name(device)
    tile = table(hardware).get(op, {}).get(shape)
    chosen, source = (tile, f"tuned/{hardware}.json") if tile else (default, "default, not tuned here")
    sizes = ", ".join(f"{name} {value}" for name, value in chosen._asdict().items())
    _log.info("%s, %s: %s (%s)", op, shape, sizes, source)
    return chosen


@functools.cache
def table(hardware: str) -> dict[str, dict[str, Tile]]:
    """Tiles by operation and shape class of one hardware; empty where it has no file.

    Raises:
        ValueError: the file is damaged; names the file and the entry.
    """
    path = FOLDER / f"{hardware}.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it or run tools/tune_ops.py again") from None
    if not isinstance(content, dict) or set(content) != set(KEYS):
        raise ValueError(f"{path}: must be an object with exactly {', '.join(KEYS)}")
    if not isinstance(content["tiles"], dict) or not all(
        isinstance(v, dict) for v in content["tiles"].values()
    ):
        raise ValueError(f"{path}: tiles must be operation -> shape class -> tile")
    return {
        op: {shape: _tile(op, raw, f"{path}: tiles, {op}, '{shape}'") for shape, raw in classes.items()}
        for op, classes in content["tiles"].items()
    }


def why_unusable(device: torch.device) -> str | None:
    """What is wrong with the file of ``device``'s hardware, or None; for the check at start-up."""
    try:
        table(hardware_name(device))
    except ValueError as error:
        return f"has a damaged file of tile sizes: {error}"
    return None


def content(
    hardware: str, versions: dict[str, str | None], measured: list[tuple[str, str, Tile, float, float]]
) -> dict[str, object]:
    """What a file holds, ready for JSON; `table` reads its tiles back.

    Args:
        measured: operation, shape class, its tile, seconds with this tile and with the default one.
    """
    tiles: dict[str, dict] = {}
    seconds: dict[str, dict] = {}
    for op, shape, tile, own, default in measured:
        tiles.setdefault(op, {})[shape] = tile._asdict()
        seconds.setdefault(op, {})[shape] = {"tuned": own, "default": default}
    return dict(zip(KEYS, (hardware, versions, tiles, seconds), strict=True))


def _tile(op: str, raw: object, where: str) -> Tile:
    if not isinstance(raw, dict) or set(raw) != set(Tile._fields):
        raise ValueError(f"{where}: must be an object with exactly {', '.join(Tile._fields)}")
    lowest = LEAST_OF_PRODUCTS if op in PRODUCTS else LEAST
    for name, least, limit in zip(Tile._fields, lowest, LIMITS, strict=True):
        value = raw[name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and least <= value <= limit and (name == "stages" or value & (value - 1) == 0)):
            what = "an integer" if name == "stages" else "a power of two"
            raise ValueError(f"{where}: {name} must be {what} in {least}..{limit}, got {value!r}")
    return Tile(**raw)
