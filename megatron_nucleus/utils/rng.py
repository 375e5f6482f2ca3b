"""Counter-based randomness: every draw is a pure function of (seed, index, purpose).

Nothing depends on rank, worker, call order or batch size, so a resumed run, another micro-batch or another
world size draws the same numbers for the same sample.
"""

from __future__ import annotations

import hashlib
import struct

import torch


def key64(seed: int, index: int, purpose: str) -> int:
    """63-bit key of (seed, index, purpose) through BLAKE2b: no two purposes share a stream."""
    payload = struct.pack("<qq", seed, index) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little") >> 1


def generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """A fresh CPU generator for one (seed, index, purpose)."""
    return torch.Generator().manual_seed(key64(seed, index, purpose))


def uniform(seed: int, index: int, purpose: str) -> float:
    """One number in [0, 1) for (seed, index, purpose), with 53 random bits."""
    return (key64(seed, index, purpose) >> 10) / float(1 << 53)


def normal_batch(seed: int, indices: list[int], purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal tensor [len(indices), *shape], fp32; row i depends on indices[i] alone."""
    out = torch.empty(len(indices), *shape)
    for row, index in zip(out, indices, strict=True):
        torch.randn(shape, generator=generator(seed, index, purpose), out=row)
    return out
