"""The loss by noise level: a mean loss hides at which noise levels a model learns."""

from __future__ import annotations

import torch
from torch import Tensor


class SigmaCurve:
    """Mean loss in equal bins of sigma in [0, 1], gathered on the device without waiting for it.

    A bin holds its lower edge; the last one also holds 1. An image whose loss is not finite is left out: it would
    hide the rest of its bin until the next `reset`, and the step that it belongs to is skipped and counted as such.

    Args:
        bins: number of bins, at least 1.
        device: where losses and noise levels are.
    """

    def __init__(self, bins: int = 10, device: torch.device | str = "cpu"):
        if bins < 1:
            raise ValueError(f"a curve over sigma needs at least 1 bin, got {bins}")
        self.bins = bins
        self._sums = torch.zeros(2, bins, dtype=torch.float64, device=device)  # rows: losses, images

    @torch.no_grad()
    def add(self, losses_B: Tensor, sigma_B: Tensor) -> None:
        """Count images: [B] loss and [B] noise level each, any float dtype.

        A sigma outside of [0, 1] is an index error of the device (on a GPU reported later).
        """
        # In fp64 sigma * bins is exact enough that no fp32 sigma below 1 rounds up to the last edge.
        sigma_B = sigma_B.detach().double()
        index_B = (sigma_B * self.bins).floor().long() - (sigma_B == 1.0).long()
        losses_B = losses_B.detach().double()
        finite_B = losses_B.isfinite()
        values = torch.stack([torch.where(finite_B, losses_B, 0.0), finite_B.double()])
        self._sums.scatter_add_(1, index_B.expand(2, -1), values)

    def sums(self) -> Tensor:
        """[2*bins] fp64, a copy: summed losses of each bin, then their numbers of images. Add them over ranks."""
        return self._sums.flatten().clone()

    def report(self, sums: Tensor) -> dict[str, float | None]:
        """``{"0.0-0.1": mean loss, ...}`` of `sums`, None for a bin without images. Waits for the device."""
        edges = [round(i / self.bins, 3) for i in range(self.bins + 1)]
        losses, images = sums.view(2, self.bins).tolist()
        return {
            f"{edges[i]}-{edges[i + 1]}": losses[i] / images[i] if images[i] else None
            for i in range(self.bins)
        }

    def reset(self) -> None:
        """Start again at nothing."""
        self._sums.zero_()
