"""Finds, on a CPU, where a GPU would make the host wait: values that are read, and sizes that depend on them."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_nucleus

PACKAGE = Path(megatron_nucleus.__file__).parent
# What brings a tensor's values to the host, and what uploads values from pageable memory (tensor, as_tensor).
READS = {
    "item", "tolist", "numpy", "cpu", "is_nonzero", "equal", "allclose", "__array__", "__bool__", "__float__",
    "__int__", "__index__", "__contains__", "tensor", "as_tensor", "from_numpy",
}  # fmt: skip
# Operators that read a value, or whose result has a size that depends on values.
OPERATORS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount",
    "equal", "is_nonzero", "repeat_interleave.Tensor", "argwhere", "count_nonzero",
}  # fmt: skip
MASKED = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
}  # with a bool mask: nonzero inside


class HostReads:
    """Counts (place, what) while `watching`; place is the package's innermost function: ``core/flow.py:add_noise``."""

    def __init__(self):
        self.found: Counter[tuple[str, str]] = Counter()
        self.operators = 0  # seen in all: 0 would mean that nothing was watched
        self._paused = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[HostReads]:
        """Count inside the block. Of backward passes only `OPERATORS` and `MASKED` are seen: torch calls no function
        modes there. tests/gpu/test_no_sync.py sees everything, on a GPU.
        """
        with _Functions(self), _Operators(self):
            yield self

    def excusing(self, function: Callable) -> Callable:
        """``function``, unwatched: its tensors are the host's own on a GPU machine, too."""

        @functools.wraps(function)
        def excused(*args, **kwargs):
            before, self._paused = self._paused, True
            try:
                return function(*args, **kwargs)
            finally:
                self._paused = before

        return excused

    def note(self, what: str) -> None:
        if not self._paused:
            self.found[_place(), what] += 1


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in READS:
            self.reads.note(name)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.reads.operators += 1
        name, full = op.overloadpacket.__name__, f"{op.overloadpacket.__name__}.{op._overloadname}"
        if name in OPERATORS or full in OPERATORS or (name in MASKED and _has_mask(args[1])):
            self.reads.note(name)
        return op(*args, **(kwargs or {}))


def _has_mask(indices) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _place() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the package"
