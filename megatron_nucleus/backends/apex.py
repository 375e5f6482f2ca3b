"""Apex's AdamW kernel for `core.optimizer.adamw.AdamW`.

NOT RUN WITH THE LIBRARY: the call follows its source (`recorded.py`; csrc/multi_tensor_adam.cu gives the arithmetic),
which a stand-in repeats in the tests (tests/backends/test_apex.py). ``apex.optimizers.FusedAdam`` calls the same
kernel, but keeps state of its own, which neither a checkpoint nor a sharded parameter of ours could hold.
"""

from __future__ import annotations

import amp_C
import torch
from torch import Tensor

from megatron_nucleus.backends import recorded
from megatron_nucleus.backends.gpu import why_no_gpu

CHUNK = 2048 * 32  # elements that one block of threads updates: apex/multi_tensor_apply/__init__.py
_DECOUPLED = 1  # ADAM_MODE_1 of csrc/multi_tensor_adam.cu: weight decay beside the update, as in AdamW
_CORRECT_BIAS = 1


def why_unavailable(device_type: str) -> str | None:
    """Why the kernel cannot run on ``device_type``, or None."""
    return recorded.drift(amp_C, recorded.library("apex").calls) or why_no_gpu(device_type)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    steps: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`core.optimizer.adamw.torch_adamw`. The kernel walks over memory without strides.

    Raises:
        ValueError: a parameter or a state that is not contiguous; a gradient is copied where it is not.
    """
    for tensor in (*params, *exp_avgs, *exp_avg_sqs):
        if not tensor.is_contiguous():
            raise ValueError(
                f"apex's AdamW needs contiguous parameters, got {list(tensor.shape)} with strides "
                f"{list(tensor.stride())}; use --adamw-backend torch"
            )
    if not params:
        return
    lists = [[grad.contiguous() for grad in grads], params, exp_avgs, exp_avg_sqs]
    never = torch.zeros(
        1, dtype=torch.int32, device=params[0].device
    )  # a flag that this kernel does not read
    numbers = (lr, beta1, beta2, eps, steps + 1, _DECOUPLED, _CORRECT_BIAS, weight_decay)
    amp_C.multi_tensor_adam(CHUNK, never, lists, *numbers)
