"""Sends what the host made to the device without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` of the host on ``device``; on a CPU itself.

    To a GPU it goes from pinned memory, behind what is queued there, while the host goes on. From pageable memory the
    driver may first wait for the stream ("API synchronization behavior", CUDA Runtime API), which
    ``torch.cuda.set_sync_debug_mode`` does not see.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
