"""What adapters ask of the GPU in common, each as a reason in one line or None."""

from __future__ import annotations

import torch

from megatron_nucleus.ops.registry import Request


def why_no_gpu(
    device_type: str, lowest: tuple[int, int] = (0, 0), highest: tuple[int, int] = (99, 9)
) -> str | None:
    """Why this machine's GPU will not do. lowest, highest: compute capabilities, both included."""
    if device_type != "cuda":
        return f"runs on cuda, not on {device_type}"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, none is visible"
    capability = torch.cuda.get_device_capability()
    if lowest <= capability <= highest:
        return None
    to = "or higher" if highest == (99, 9) else f"to {highest[0]}.{highest[1]}"
    found = f"{capability[0]}.{capability[1]}"
    return f"needs compute capability {lowest[0]}.{lowest[1]} {to}, this GPU has {found}"


def why_no_heads(request: Request, widest: int) -> str | None:
    """Why a head of the model does not fit: wider than ``widest``, or not in 16-byte pieces.

    8 half-precision channels are 16 bytes, what such kernels load at a time.
    """
    if request.sizes is None:
        return None
    width = request.sizes.head_width
    if width % 8 or width > widest:
        return f"takes heads of up to {widest} channels in multiples of 8, the model's have {width}"
    return None
