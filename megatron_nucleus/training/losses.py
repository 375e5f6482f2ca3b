"""The training objective: rectified-flow velocity MSE, the router's z-loss and the wavelet loss of the last stage."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nucleus.core.patches import unpack
from megatron_nucleus.types import Routing
from megatron_nucleus.utils.config import knob
from megatron_nucleus.utils.errors import ConfigError

log = logging.getLogger(__name__)

# Of the Haar transform: first letter along the height, second along the width; L = average, H = difference.
BANDS = ("LL", "LH", "HL", "HH")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses beside the velocity MSE, whose weight is 1."""

    moe_z_loss_coeff: float = knob(5e-7, "weight of the router z-loss (paper)")
    wavelet_loss_coeff: float = knob(
        0.0, "weight of the wavelet loss; the paper has 0.1, in its 1024 px stage only"
    )
    # The published weights are unknown. Equal ones would only re-weight noise levels (`wavelet_loss`). Ours count
    # an error of detail three times as much as one of the average, without a preferred direction: the velocity MSE
    # sees both alike, and what a high resolution adds is detail. They sum to 4, as four equal ones would, so that
    # the coefficient means the same for an error spread evenly over the bands.
    wavelet_band_weights: tuple[float, float, float, float] = knob(
        (0.4, 1.2, 1.2, 1.2), f"weights of the Haar bands {', '.join(BANDS)} (own choice)"
    )

    def __post_init__(self) -> None:
        for name in ("moe_z_loss_coeff", "wavelet_loss_coeff"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"losses.{name}: must be a number >= 0, got {getattr(self, name)}")
        weights = self.wavelet_band_weights
        if len(weights) != len(BANDS) or not all(0.0 <= w < math.inf for w in weights) or not any(weights):
            raise ConfigError(
                f"losses.wavelet_band_weights: must be {len(BANDS)} numbers >= 0 ({', '.join(BANDS)}), not all "
                f"zero, got {list(weights)}; losses.wavelet_loss_coeff: 0 turns the loss off"
            )


def check_losses(config: LossConfig, patch_size: int) -> None:
    """Refuse what cannot be computed and warn of what does nothing new; call it once, before training.

    Args:
        patch_size: latent pixels per token side (`ModelShape.patch_size`).

    Raises:
        ConfigError: a wavelet loss on patches of an odd size, with which a latent may have an odd side.
    """
    if not config.wavelet_loss_coeff:
        return
    if patch_size % 2:
        raise ConfigError(
            f"losses.wavelet_loss_coeff: {config.wavelet_loss_coeff} needs latents of even height and width, which "
            f"model.patch_size: {patch_size} does not promise; set the coefficient to 0 or use an even patch size"
        )
    if len(set(config.wavelet_band_weights)) == 1:
        weight = config.wavelet_band_weights[0]
        log.warning(
            "losses.wavelet_band_weights are equal: the wavelet loss is then %g * sigma^2 times each image's "
            "velocity MSE, a re-weighting of noise levels and nothing else; unequal weights make it a loss of its "
            "own",
            4 * weight,
        )


def flow_loss_per_image(velocity_BSP: Tensor, target_BSP: Tensor) -> Tensor:
    """Mean squared error over the latent values of each image: [B] fp32."""
    return (velocity_BSP.float() - target_BSP.float()).square().mean(dim=(1, 2))


def router_z_loss(routings: list[Routing]) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, summed over the MoE layers: fp32 scalar (ST-MoE, arXiv 2202.08906).

    Keeps router logits small; zero for a model without MoE layers.
    """
    if not routings:
        return torch.zeros(())
    return torch.stack([r.logits_BSE.float().logsumexp(-1).square().mean() for r in routings]).sum()


def wavelet_loss(
    estimate_BSP: Tensor,
    clean_BSP: Tensor,
    grid: tuple[int, int],
    patch_size: int,
    band_weights: Sequence[float],
) -> Tensor:
    """Weighted error of the clean estimate in the four bands of one orthonormal 2-D Haar step.

    The sum over the bands of weight * mean square of the band, mean over images. With the estimate
    x_sigma + sigma * v the error is sigma * (v - target). Four weights of 1 therefore give, by Parseval, exactly
    4 * sigma^2 times the velocity MSE of each image. The paper names the loss and not its weights.

    Memory: four fp32 copies of the latents (error, its unpacked form, half-way sums, bands), 1 MiB each and image at
    1024 px.

    Args:
        estimate_BSP, clean_BSP: packed latents, any float dtype; the arithmetic is fp32.
        grid: rows and columns of image tokens.
        patch_size: latent pixels per token side.
        band_weights: of `BANDS`, in that order.

    Returns:
        fp32 scalar.

    Raises:
        ConfigError: the latent's height or width is odd.
    """
    error_BCHW = unpack(estimate_BSP.float() - clean_BSP.float(), grid, patch_size)
    H, W = error_BCHW.shape[-2:]
    if H % 2 or W % 2:
        raise ConfigError(
            f"losses.wavelet_loss_coeff: a latent of {H} x {W} (rows x columns, model.patch_size: {patch_size}) has "
            "no Haar transform; use an even model.patch_size or set the coefficient to 0"
        )
    weighted = [w * band.square().mean() for w, band in zip(band_weights, haar(error_BCHW), strict=True)]
    return torch.stack(weighted).sum()


def haar(x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of the orthonormal 2-D Haar transform: the `BANDS`, each [B, C, H/2, W/2]; H and W even."""
    above, below = x_BCHW.unflatten(2, (-1, 2)).unbind(3)  # the two rows of each 2 x 2 square
    bands = []
    for rows in (above + below, above - below):
        left, right = rows.unflatten(3, (-1, 2)).unbind(4)
        bands += [(left + right) * 0.5, (left - right) * 0.5]  # 1/sqrt(2) for each of the two directions
    return tuple(bands)
