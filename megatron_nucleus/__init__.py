"""Megatron-Nucleus: training for sparse mixture-of-experts diffusion transformers.

Importing this package touches no GPU, no network and no optional library.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def load_model(path: Any, device: Any = "cpu", dtype: Any = None) -> Any:
    """Load a `NucleusTransformer` from a native checkpoint or a diffusers folder; see `export.load.load_model`."""
    from megatron_nucleus.export.load import load_model as load

    return load(path, device=device, dtype=dtype)
