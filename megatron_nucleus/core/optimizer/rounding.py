"""How the optimizer writes what it computed in fp32 into tensors of 16 bits: stochastically rounded.

The random bits are a function of (seed, number of the update, name, what is written, position of the value in the
whole parameter) and of nothing else (`ops/stochastic_round.py`). So a resumed run rounds as the uninterrupted one did,
ranks that hold copies of a value round it alike, and a value is rounded alike on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_nucleus.ops.stochastic_round import stochastic_round
from megatron_nucleus.utils import rng

# Values computed in fp32 at once where the stored ones are narrower: bounds the copies (64 MiB each on a GPU; on a CPU
# they stay in the cache).
PIECE_VALUES = {"cpu": 1 << 16, "cuda": 1 << 24}


class Rounding:
    """Writes fp32 values into bf16 tensors.

    Args:
        seed: of the run.
        function: a backend of `ops.stochastic_round`.

    Attributes:
        updates: number of the update under way; set by the optimizer before each.
    """

    def __init__(self, seed: int = 0, function: Callable = stochastic_round):
        self.seed, self.function, self.updates = seed, function, 0

    def key(self, name: str) -> int:
        """Names one tensor's draw in the update under way."""
        return rng.key64(self.seed, self.updates, f"round:{name}")

    def write(self, target: Tensor, values: Tensor, key: int, first: int) -> None:
        """Round ``values`` [N] into ``target`` [N], contiguous; one that is not bf16 takes them as they are.

        Args:
            key: of `key`. first: position in the whole parameter of the first value.
        """
        if target.dtype != torch.bfloat16:
            target.copy_(values)
        elif target.numel():
            self.function(values, key, first, target.view(torch.int16))


def wide(tensor: Tensor) -> Tensor:
    """The values in fp32 at least: a copy of a narrower tensor, a wider one itself."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Slices that cut the flattened ``tensor`` into pieces of `PIECE_VALUES`."""
    size = PIECE_VALUES["cpu" if tensor.device.type == "cpu" else "cuda"]
    return (slice(low, low + size) for low in range(0, tensor.numel(), size))


def in_memory_order(view: Tensor) -> Tensor:
    """A view without gaps, axes in any order, as one row of values in the order in which memory holds them."""
    return view.as_strided((view.numel(),), (1,))
