"""Helpers of several tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str, *args: object, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run a program of tools/ as a user would."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
    if check and done.returncode:
        raise AssertionError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done
