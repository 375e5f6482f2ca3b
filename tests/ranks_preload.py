"""Imported once by the server that test ranks are forked from (`tests/ranks.py`)."""

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

import megatron_nucleus.training.training

torch.set_num_threads(1)
