"""Rotary positions on three axes (frame, height, width), centred on the image.

Image token (row, column) of an h x w grid stands at (0, row - ceil(h/2), column - ceil(w/2)); text token i stands
at max(h//2, w//2) + i on all three axes, so text keys depend on the image size.
Source: diffusers `NucleusMoEEmbedRope` with scale_rope=True.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

THETA = 10000.0


@functools.lru_cache(maxsize=64)
def rope_table(
    axes_dims: tuple[int, int, int], grid: tuple[int, int], text_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Unit complex rotations (image [S, K/2], text [L, K/2]), complex64 on ``device``."""
    with torch.inference_mode(False), torch.no_grad():
        h, w = grid
        rows = torch.arange(h, device=device) - (h - h // 2)
        cols = torch.arange(w, device=device) - (w - w // 2)
        positions_S3 = torch.stack(
            [
                torch.zeros(h * w, device=device, dtype=torch.long),
                rows.repeat_interleave(w),
                cols.repeat(h),
            ],
            dim=1,
        )
        text_L = max(h // 2, w // 2) + torch.arange(text_tokens, device=device)
        image = _rotations(positions_S3, axes_dims)
        text = _rotations(text_L[:, None].expand(-1, 3), axes_dims)
    return image, text


def _rotations(positions_T3: Tensor, axes_dims: tuple[int, int, int]) -> Tensor:
    """[T, 3] integer positions -> [T, K/2] complex64; axis a turns its own axes_dims[a]/2 channel pairs."""
    parts = []
    for axis, dim in enumerate(axes_dims):
        exponent = torch.arange(0, dim, 2, device=positions_T3.device).to(torch.float32).div(dim)
        frequency = 1.0 / torch.pow(THETA, exponent)
        angle = torch.outer(positions_T3[:, axis], frequency)
        parts.append(torch.polar(torch.ones_like(angle), angle))
    return torch.cat(parts, dim=-1)
