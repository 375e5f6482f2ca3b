"""The Nucleus-Image transformer: packed latents, a noise level and a text in, a velocity out.

Single device, plain PyTorch. Source: arXiv 2604.12163 and diffusers' `NucleusMoEImageTransformer2DModel`, with
which outputs, gradients and token choices agree (tests/core/models/test_parity_diffusers.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nucleus.core.kernels import Kernels, resolve_kernels
from megatron_nucleus.core.models.init import init_weights
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.transformer.block import TransformerBlock
from megatron_nucleus.core.transformer.embeddings import TimeEmbedding
from megatron_nucleus.core.transformer.norm import EPS, RMSNorm
from megatron_nucleus.core.transformer.rope import rope_table
from megatron_nucleus.types import NormalisedText, Routing, TextFeatures, TextKV


class NucleusTransformer(nn.Module):
    """Sparse mixture-of-experts diffusion transformer.

    Args:
        shape: architecture (`core/models/presets.py`).
        kernels: the operations to run on; None resolves the best for the current default device.
        seed: of the initial weights (`core/models/init.py`); ignored on the meta device.
    """

    def __init__(self, shape: ModelShape, kernels: Kernels | None = None, seed: int = 0):
        super().__init__()
        kernels = kernels or resolve_kernels(device_type=torch.get_default_device().type)
        D = shape.width
        self.shape, self.kernels = shape, kernels
        self.image_in = nn.Linear(shape.patch_channels, D)
        self.time_embed = TimeEmbedding(D, kernels)
        self.text_norm = RMSNorm(shape.text_dim, kernels)
        self.blocks = nn.ModuleList(TransformerBlock(shape, i, kernels) for i in range(shape.num_layers))
        self.out_modulation = nn.Linear(D, 2 * D)  # rows: scale, shift
        self.image_out = nn.Linear(D, shape.patch_channels, bias=False)
        if not self.image_in.weight.is_meta:
            init_weights(self, seed)

    def project_text(self, text_BLU: Tensor, text_mask_BL: Tensor | None, grid: tuple[int, int]) -> TextKV:
        """Every layer's text keys and values, a value to keep over denoising steps.

        Args:
            text_BLU: features of the frozen text encoder.
            text_mask_BL: True where a token is real; None = all are.
            grid: rows and columns of image tokens (text positions start beyond the image).
        """
        _check_text(text_BLU, text_mask_BL, self.shape.text_dim)
        text = self._normalise(text_BLU)
        rotation = rope_table(self.shape.axes_dims_rope, tuple(grid), text_BLU.shape[1], text_BLU.device)[1]
        pairs = [block.project_text(text, rotation) for block in self.blocks]
        return TextKV(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), text_mask_BL, tuple(grid))

    def forward(
        self,
        latents_BSP: Tensor,
        sigma_B: Tensor,
        text: TextKV | TextFeatures,
        grid: tuple[int, int],
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Predict the velocity x0 - noise.

        Args:
            latents_BSP: noisy packed latents (`core/patches.py`), S = grid[0]*grid[1].
            sigma_B: noise level in [0, 1], 1 = noise.
            text: `project_text`'s value, or raw features that each block projects by itself.
            grid: rows and columns of image tokens.
            return_routing: also return the MoE layers' routings, in layer order.

        Returns:
            velocity [B, S, P]; with ``return_routing`` a pair (velocity, routings).

        Raises:
            ValueError: shapes that do not fit each other, naming them.
        """
        grid = tuple(grid)
        self._check_inputs(latents_BSP, sigma_B, text, grid)
        x_BSD = self.image_in(latents_BSP)
        temb_BD = self.time_embed(sigma_B, x_BSD.dtype)
        act_BD = F.silu(temb_BD)
        per_layer, text_tokens = self._text_of_each_layer(text)
        rotations = rope_table(self.shape.axes_dims_rope, grid, text_tokens, x_BSD.device)
        mask_BT = _key_mask(x_BSD, text.mask_BL)
        routings = []
        for block, layer_text in zip(self.blocks, per_layer, strict=True):
            x_BSD, routing = block(x_BSD, temb_BD, act_BD, layer_text, mask_BT, rotations)
            if routing is not None:
                routings.append(routing)
        scale, shift = self.out_modulation(act_BD).chunk(2, dim=-1)
        out_BSD, _ = self.kernels.modulated_layer_norm(x_BSD, scale, EPS)
        velocity_BSP = self.image_out(out_BSD + shift.unsqueeze(1))
        return (velocity_BSP, routings) if return_routing else velocity_BSP

    def _text_of_each_layer(self, text: TextKV | TextFeatures) -> tuple[list, int]:
        if isinstance(text, TextKV):
            return list(zip(text.k_BLGK, text.v_BLGK, strict=True)), text.k_BLGK[0].shape[1]
        return [self._normalise(text.features_BLU)] * len(self.blocks), text.features_BLU.shape[1]

    def _normalise(self, text_BLU: Tensor) -> NormalisedText:
        """Without the norm's weight, which each block folds into its own first projection."""
        weight_U, kind = self.text_norm.weight, text_BLU.device.type
        features_BLU = self.kernels.rms_norm(text_BLU, torch.ones_like(weight_U), EPS)
        # Cast once, and not anew in each block's product, which would keep a copy. Meta tensors know no autocast.
        if kind != "meta" and torch.is_autocast_enabled(kind):
            features_BLU = features_BLU.to(torch.get_autocast_dtype(kind))
        return NormalisedText(features_BLU, weight_U)

    def _check_inputs(self, latents: Tensor, sigma: Tensor, text: TextKV | TextFeatures, grid: tuple) -> None:
        if latents.ndim != 3 or latents.shape[2] != self.shape.patch_channels:
            raise ValueError(
                f"latents must be [B, S, {self.shape.patch_channels}] (packed patches), got {list(latents.shape)}"
            )
        B, S, _ = latents.shape
        if grid[0] * grid[1] != S:
            raise ValueError(f"grid {grid} has {grid[0] * grid[1]} tokens, latents have {S}")
        if sigma.shape != (B,):
            raise ValueError(f"sigma must be [{B}], one noise level per image, got {list(sigma.shape)}")
        if isinstance(text, TextKV):
            if text.grid != grid:
                raise ValueError(f"text keys were projected for grid {text.grid}, the image has {grid}")
            if len(text.k_BLGK) != len(self.blocks) or text.k_BLGK[0].shape[0] != B:
                raise ValueError(
                    f"text K/V hold {len(text.k_BLGK)} layers of {text.k_BLGK[0].shape[0]} samples; "
                    f"the model has {len(self.blocks)} layers and the batch {B} samples"
                )
        else:
            _check_text(text.features_BLU, text.mask_BL, self.shape.text_dim)
            if text.features_BLU.shape[0] != B:
                raise ValueError(f"{text.features_BLU.shape[0]} texts for {B} images")


def _check_text(text_BLU: Tensor, mask_BL: Tensor | None, text_dim: int) -> None:
    if text_BLU.ndim != 3 or text_BLU.shape[2] != text_dim:
        raise ValueError(f"text features must be [B, L, {text_dim}], got {list(text_BLU.shape)}")
    if mask_BL is not None and mask_BL.shape != text_BLU.shape[:2]:
        raise ValueError(f"text mask {list(mask_BL.shape)} does not fit text features {list(text_BLU.shape)}")


def _key_mask(x_BSD: Tensor, mask_BL: Tensor | None) -> Tensor | None:
    """Mask over [image ; text] keys: every image key counts."""
    if mask_BL is None:
        return None
    image = torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
    return torch.cat([image, mask_BL.to(torch.bool)], dim=1)
