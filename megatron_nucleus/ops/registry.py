"""Which implementation of an operation runs: chosen by name, resolved once when the model is built."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_nucleus.ops.table import AUTO_ORDER, ROWS, Row
from megatron_nucleus.utils.errors import ConfigError, nearest


class Sizes(NamedTuple):
    """Widths of a model that a backend may refuse: D, H, G, K, E and F of the legend in types.py."""

    width: int
    query_heads: int
    kv_heads: int
    head_width: int
    experts: int
    expert_width: int


class Request(NamedTuple):
    """What `resolve` is asked for. dtype: of the activations; None, like sizes=None = do not check it.

    A backend's module may define ``why_unfit(request) -> str | None``: why it cannot serve this model on this GPU
    although its library is there. It is asked after ``why_unavailable(device_type)``, once, when the model is built.
    """

    op: str
    backend: str
    device_type: str
    dtype: torch.dtype | None
    sizes: Sizes | None


_log = logging.getLogger(__name__)
_rows: dict[str, dict[str, Row]] = {}


def register(row: Row) -> None:
    """Add a backend. Registering one (operation, backend) pair twice is an error.

    Raises:
        ValueError: the pair exists.
    """
    backends = _rows.setdefault(row.op, {})
    if row.backend in backends:
        raise ValueError(f"{row.op} already has a backend '{row.backend}'")
    backends[row.backend] = row


def operations() -> tuple[str, ...]:
    """Names of all operations."""
    return tuple(_rows)


def backends(op: str) -> tuple[Row, ...]:
    """Rows of one operation in table order.

    Raises:
        ConfigError: unknown operation.
    """
    if op not in _rows:
        raise ConfigError(f"unknown operation '{op}'{nearest(op, _rows)}; one of: {', '.join(_rows)}")
    return tuple(_rows[op].values())


def why_unavailable(
    op: str,
    backend: str,
    *,
    device_type: str,
    dtype: torch.dtype | None = None,
    sizes: Sizes | None = None,
) -> str | None:
    """Why ``backend`` cannot serve ``op`` here, in one line; None when it can.

    Args:
        device_type: ``cpu`` or ``cuda``, where the tensors will live.
        dtype: dtype of the activations; None = do not check.
        sizes: of the model; None = do not check.

    Raises:
        ConfigError: unknown operation or a backend it does not have.
    """
    row = _row(op, backend)
    if device_type not in row.devices.split():
        return f"runs on {' and '.join(row.devices.split())}, not on {device_type}"
    if dtype is not None and _dtype_name(dtype) not in row.dtypes.split():
        return f"takes {', '.join(row.dtypes.split())}, not {_dtype_name(dtype)}"
    try:
        module = importlib.import_module(row.target.split(":")[0])
    except Exception as error:  # optional libraries raise RuntimeError and AssertionError at import, too
        return missing(error)
    probe = getattr(module, "why_unavailable", None)
    reason = probe(device_type) if probe is not None else None
    if reason is None and hasattr(module, "why_unfit"):
        reason = module.why_unfit(Request(op, backend, device_type, dtype, sizes))
    return reason


def choose(
    op: str,
    choice: str,
    *,
    device_type: str,
    dtype: torch.dtype | None = None,
    sizes: Sizes | None = None,
) -> Row:
    """The row that `resolve` loads; same arguments and errors."""
    asked = {"device_type": device_type, "dtype": dtype, "sizes": sizes}
    if choice != "auto":
        reason = why_unavailable(op, choice, **asked)
        if reason is not None:
            usable = [
                row.backend for row in backends(op) if why_unavailable(op, row.backend, **asked) is None
            ]
            raise ConfigError(
                f"{op} backend '{choice}' {reason}. Usable here: {', '.join(usable) or 'none'}."
            )
        return _row(op, choice)
    rows = {row.backend: row for row in backends(op)}
    for backend in AUTO_ORDER.get(device_type, ("torch",)):
        if backend in rows and why_unavailable(op, backend, **asked) is None:
            return rows[backend]
    raise ConfigError(
        f"{op}: no backend of {', '.join(rows)} serves device '{device_type}' and dtype {dtype}"
    )


def resolve(
    op: str,
    choice: str = "auto",
    *,
    device_type: str,
    dtype: torch.dtype | None = None,
    sizes: Sizes | None = None,
) -> Callable:
    """Return the implementation of ``op`` to keep and call.

    Args:
        op: operation name (`operations`).
        choice: a backend name, or ``auto``: the first usable one of ``AUTO_ORDER[device_type]``, logged once.
        device_type, dtype, sizes: as in `why_unavailable`. A device without a written order uses ``torch``.

    Raises:
        ConfigError: unknown operation or backend, or a named backend that cannot be honoured; the message
            gives the reason and the usable alternatives.
    """
    row = choose(op, choice, device_type=device_type, dtype=dtype, sizes=sizes)
    if choice == "auto":
        _announce(f"{op} on {device_type}: {row.backend} ({row.note})")
    return _load(row)


def _row(op: str, backend: str) -> Row:
    rows = {row.backend: row for row in backends(op)}
    if backend not in rows:
        allowed = ("auto", *rows)
        raise ConfigError(
            f"{op} has no backend '{backend}'{nearest(backend, allowed)}; one of: {', '.join(allowed)}"
        )
    return rows[backend]


def _load(row: Row) -> Callable:
    module, function = row.target.split(":")
    return getattr(importlib.import_module(module), function)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def missing(error: Exception) -> str:
    """Why a backend's module could not be imported, as a reason: ``needs X, not installed``."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name == "megatron_nucleus._C":
            return "needs the C++ extension, not built (make build)"
        if error.name == "megatron_nucleus._C_cuda":
            return (
                "needs the CUDA extension, not built (make build, where nvcc and a CUDA build of torch are)"
            )
        return f"needs {error.name}, not installed"
    text = " ".join(str(error).split())[:200]
    if "operator megatron_nucleus::" in text:
        return "needs the C++ extension of this version, an older one is built (make build)"
    return f"needs a library that fails to import ({type(error).__name__}: {text})"


@functools.cache
def _announce(line: str) -> None:
    _log.info(line)


for _built_in in ROWS:
    register(_built_in)
