"""Which state of the source tree is running."""

from __future__ import annotations

import subprocess
from pathlib import Path

import megatron_nucleus


def git_commit() -> str | None:
    """Commit of the source tree this package was imported from, with ``-dirty`` if changed; None outside git."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(megatron_nucleus.__file__).parent, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
