"""Text features to keys and values: two linear maps one behind the other, or their product where that is less work.

Per layer a text token goes through ``text_in`` (U -> D, with a bias) and then to keys and values (D -> M). Nothing
stands between the two, so their matrices may be multiplied first; over many tokens that saves most of the work. The
weight of the norm before them is folded into ``text_in`` too: the features of a frozen encoder then need no gradient,
and neither does anything on the way to them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def project(features_BLU: Tensor, norm_U: Tensor, in_DU: Tensor, in_bias_D: Tensor, out_MD: Tensor) -> Tensor:
    """``((features * norm) @ in^T + bias) @ out^T``, [B, L, M].

    Args:
        features_BLU: features with unit RMS. norm_U: weight of their norm.
        in_DU, in_bias_D: `text_in`. out_MD: rows of the key and the value projection.
    """
    U, D, M = in_DU.shape[1], in_DU.shape[0], out_MD.shape[0]
    scaled_DU = in_DU * norm_U
    if product_pays(features_BLU.shape[0] * features_BLU.shape[1], U, D, M):
        return F.linear(features_BLU, out_MD @ scaled_DU, out_MD @ in_bias_D)
    return F.linear(F.linear(features_BLU, scaled_DU, in_bias_D), out_MD)


def product_pays(tokens: int, U: int, D: int, M: int) -> bool:
    """Whether multiplying the matrices first takes fewer FLOPs over forward and backward.

    A rule of shapes alone: training, validation and recomputation take the same way. Multiply-adds, with no gradient
    for the features: one behind the other ``tokens * (2*U*D + 3*D*M)``; the product ``tokens * 2*U*M + 3*U*D*M``.
    """
    return tokens * 2 * U * M + 3 * U * D * M < tokens * (2 * U * D + 3 * D * M)
