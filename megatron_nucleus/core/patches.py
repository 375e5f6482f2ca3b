"""Latent images <-> image tokens, in diffusers' order: a token holds (channel, row, column) of its patch."""

from __future__ import annotations

from torch import Tensor

from megatron_nucleus.utils.errors import ConfigError


def pack(latents_BCHW: Tensor, patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """[B, C, H, W] -> ([B, S, P], grid) with grid = (H/patch, W/patch) and P = C*patch*patch.

    Raises:
        ConfigError: H or W is not divisible by the patch.
    """
    B, C, H, W = latents_BCHW.shape
    if H % patch_size or W % patch_size:
        raise ConfigError(
            f"a latent of {H} x {W} (rows x columns) cannot be cut into {patch_size} x {patch_size} patches; "
            f"choose height and width that are multiples of codec stride x {patch_size}"
        )
    h, w = H // patch_size, W // patch_size
    x = latents_BCHW.reshape(B, C, h, patch_size, w, patch_size).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, h * w, C * patch_size * patch_size), (h, w)


def unpack(tokens_BSP: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `pack`: ([B, S, P], grid) -> [B, C, H, W]."""
    B, S, P = tokens_BSP.shape
    h, w = grid
    if h * w != S:
        raise ConfigError(f"{S} tokens do not form a grid of {h} x {w}")
    C = P // (patch_size * patch_size)
    x = tokens_BSP.reshape(B, h, w, C, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C, h * patch_size, w * patch_size)
