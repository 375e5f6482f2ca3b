"""Imported once by the server that test ranks are forked from (`tests/ranks.py`): what takes seconds to load."""

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

import megatron_nucleus.training.training  # noqa: F401

torch.set_num_threads(1)
