"""The operations that take the most time of a profile, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

NAME_LENGTH = 90  # names of C++ templates run to a thousand characters; own choice
# What names the regions of the backward pass (`regions.py`): the measuring, not the measured.
_OWN = ("_Edge", "_EdgeBackward", "autograd::engine::evaluate_function: _EdgeBackward", "[memory]")


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """One operation of a profile.

    calls: in all profiled steps. self_s: seconds in it and not in what it called, of all calls.
    share_frac: of the time of all rows, in [0, 1].
    """

    name: str
    calls: int
    self_s: float
    share_frac: float


def kernel_rows(profile: torch.profiler.profile, on_gpu: bool) -> list[KernelRow]:
    """Every operation of a profile, the most costly first; the shares add up to 1.

    Args:
        on_gpu: the kernels on the GPU and their time there; else the operators on the CPU. Named ranges are left
            out: their kernels are counted already.
    """
    found = []
    for row in profile.key_averages():
        if getattr(row, "is_user_annotation", False) or row.key in _OWN:
            continue
        if on_gpu and row.device_type != torch.autograd.DeviceType.CUDA:
            continue  # an operator on the host: its kernels have rows of their own
        time_us = row.self_device_time_total if on_gpu else row.self_cpu_time_total
        found.append((row.key, row.count, time_us / 1e6))
    return with_shares(found)


def with_shares(found: Sequence[tuple[str, int, float]]) -> list[KernelRow]:
    """(name, calls, own seconds) -> rows, the most costly first, by name where equal; nothing without any time."""
    total_s = sum(seconds for _, _, seconds in found)
    if total_s <= 0.0:
        return []
    rows = [KernelRow(name, calls, seconds, seconds / total_s) for name, calls, seconds in found]
    return sorted(rows, key=lambda row: (-row.self_s, row.name))


def table(rows: Sequence[KernelRow], top: int, steps: int) -> str:
    """Markdown of the first ``top`` rows and one for the rest; times per step."""
    shown, rest = list(rows[:top]), rows[top:]
    if rest:
        shown.append(
            KernelRow(
                f"{len(rest)} others",
                sum(r.calls for r in rest),
                sum(r.self_s for r in rest),
                sum(r.share_frac for r in rest),
            )
        )
    lines = ["| kernel | calls per step | own ms per step | share |", "|---|---:|---:|---:|"]
    for row in shown:
        name = row.name if len(row.name) <= NAME_LENGTH else f"{row.name[: NAME_LENGTH - 3]}..."
        calls = f"{row.calls / steps:.1f}".removesuffix(".0")
        # A template's name may hold the sign that ends a cell.
        name = name.replace("|", "\\|")
        lines.append(f"| `{name}` | {calls} | {row.self_s / steps * 1e3:.3f} | {row.share_frac:.1%} |")
    return "\n".join(lines)
