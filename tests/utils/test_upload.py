"""What goes to a GPU goes from pinned memory."""

from __future__ import annotations

import pytest
import torch

from megatron_nucleus.utils.upload import upload


def test_on_a_cpu_it_is_the_tensor_itself():
    x = torch.randn(3)
    assert upload(x, torch.device("cpu")) is x


def test_to_a_gpu_it_is_pinned_first_and_nobody_waits():
    """The calls, recorded in place of a GPU."""
    asked = []

    class Tensor:
        def pin_memory(self):
            asked.append("pin")
            return self

        def to(self, device, non_blocking=False):
            asked.append((str(device), non_blocking))
            return self

    upload(Tensor(), torch.device("cuda:1"))
    assert asked == ["pin", ("cuda:1", True)]


@pytest.mark.gpu
def test_values_arrive():
    x = torch.randn(1000, 7)
    there = upload(x, torch.device("cuda"))
    assert there.is_cuda
    assert torch.equal(there.cpu(), x)
