"""Which device a program runs on, and in which precision."""

from __future__ import annotations

import torch

from megatron_nucleus.utils.errors import ConfigError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA where it is there. Raises ConfigError for an unknown or absent device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(
            f"--device {name}: one of auto, cpu, cuda, cuda:N{nearest(name, ('auto', 'cpu', 'cuda'))}"
        )
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here; use --device cpu"
        )
    return torch.device(name)
