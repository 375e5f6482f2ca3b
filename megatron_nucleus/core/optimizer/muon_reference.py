"""Muon, one matrix at a time in plain code: the slow twin of `muon.py`, for tests and for reading.

Sources: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (momentum, Newton-Schulz and
its coefficients); Moonlight, arXiv 2502.16982, section 2.2 (decoupled weight decay and the update scale
0.2*sqrt(max(rows, columns)), which gives updates the RMS of AdamW's so that one learning rate serves both).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_nucleus.ops.orthogonalize import coefficients


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate the polar factor U V^T of ``matrix`` = U S V^T.

    Each step maps every singular value s to a*s + b*s^3 + c*s^5. The coefficients trade convergence to 1 for
    a steep slope at 0, so the result has singular values around 1, not equal to 1 (bands: `ops.orthogonalize`).

    Args:
        matrix: [rows, columns], any float dtype; the arithmetic keeps it.
        steps: Newton-Schulz steps, at least 3.
    """
    x = matrix / max(float(torch.linalg.matrix_norm(matrix)), 1e-7)
    for a, b, c in coefficients(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_update(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    lr: float,
    *,
    beta: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    scale: float = 0.2,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One Muon step of one matrix; returns (new weight, new momentum), inputs stay as they are."""
    momentum = beta * momentum + (1 - beta) * gradient
    direction = beta * momentum + (1 - beta) * gradient if nesterov else momentum
    rows, columns = weight.shape
    update = scale * math.sqrt(max(rows, columns)) * orthogonalize(direction, steps)
    return weight - lr * weight_decay * weight - lr * update, momentum
