"""GPUs and networks by name, and how long an exchange between ranks takes on them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_nucleus.core.parallel_state import Layout
from megatron_nucleus.training.flops import device_peak_flops
from megatron_nucleus.utils.errors import ConfigError, nearest

# A collective's start and synchronisation over many ranks. Own choice, of the order of NCCL's small messages.
COLLECTIVE_START_S = 20e-6


class Gpu(NamedTuple):
    """name: as CUDA reports it, to look up the matmul peak (`training/flops.py`).

    memory_bytes, memory_bytes_per_s: size and bandwidth. link_bytes_per_s: to the other GPUs of its node, one way.
    fp8_tflops: dense peak of products of 8-bit operands; None = it has none.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float
    fp8_tflops: float | None = None

    def peak_flops(self, dtype: torch.dtype) -> float:
        """Dense matmul peak in FLOP/s."""
        return device_peak_flops("cuda", dtype, self.name)

    def peak_fp8_flops(self) -> float:
        """The same of 8-bit operands.

        Raises:
            ConfigError: the GPU has no such products.
        """
        if self.fp8_tflops is None:
            raise ConfigError(
                f"--fp8: {self.name} has no FP8 products (compute capability 8.9 or higher has them)"
            )
        return self.fp8_tflops * 1e12


# NVIDIA data sheets (capacity in GB = 1e9 bytes, bandwidth; NVLink is given there for both ways together, half of it
# stands here; so of FP8 peaks that are given with sparsity). L40S, L40 and L4 have no NVLink: PCIe 4.0 x16.
GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100", 80 * 10**9, 3.35e12, 450e9, 1979.0),
    "h100_pcie": Gpu("H100 PCIe", 80 * 10**9, 2.0e12, 300e9, 1513.0),
    "h100_nvl": Gpu("H100 NVL", 94 * 10**9, 3.9e12, 300e9, 1671.0),
    "h200": Gpu("H200", 141 * 10**9, 4.8e12, 450e9, 1979.0),
    "h200_nvl": Gpu("H200 NVL", 141 * 10**9, 4.8e12, 450e9, 1671.0),
    "h800": Gpu("H800", 80 * 10**9, 3.35e12, 200e9, 1979.0),
    "h20": Gpu("H20", 96 * 10**9, 4.0e12, 450e9, 296.0),
    "b200": Gpu("B200", 180 * 10**9, 7.7e12, 900e9, 4500.0),
    "a100": Gpu("A100", 80 * 10**9, 2.039e12, 300e9),
    "a100_40gb": Gpu("A100", 40 * 10**9, 1.555e12, 300e9),
    "a800": Gpu("A800", 80 * 10**9, 2.039e12, 200e9),
    "l40s": Gpu("L40S", 48 * 10**9, 0.864e12, 32e9, 733.0),
    "l40": Gpu("L40", 48 * 10**9, 0.864e12, 32e9, 362.0),
    "l4": Gpu("L4", 24 * 10**9, 0.3e12, 32e9, 242.0),
}

# Gb/s per GPU, one way: a network port of this rate beside each GPU, or a share of a node's.
NETWORKS_GBITS: dict[str, float] = {
    "ib800": 800.0,
    "ib400": 400.0,
    "ib200": 200.0,
    "roce400": 400.0,
    "roce200": 200.0,
    "efa400": 400.0,
    "eth100": 12.5,  # 100 Gb/s for a node of eight
}
NO_GPU = ("auto", "cuda", "cpu")  # what `training.device` says in a configuration that names none


def gpu_of(name: str) -> Gpu:
    """The named GPU.

    Raises:
        ConfigError: not in the table, naming the nearest.
    """
    if name not in GPUS:
        raise ConfigError(f"--device {name}: unknown{nearest(name, GPUS)}; one of: {', '.join(GPUS)}")
    return GPUS[name]


def network_bytes_per_s(name: str) -> float:
    """Rate per GPU and direction of a named network, or of a number of Gb/s.

    Raises:
        ConfigError: neither in the table nor a positive number.
    """
    if name in NETWORKS_GBITS:
        return NETWORKS_GBITS[name] * 1e9 / 8
    try:
        gbits = float(name)
    except ValueError:
        gbits = 0.0
    if not 0 < gbits < float("inf"):
        raise ConfigError(
            f"--network {name}: unknown{nearest(name, NETWORKS_GBITS)}; Gb/s per GPU, or one of: "
            f"{', '.join(NETWORKS_GBITS)}"
        )
    return gbits * 1e9 / 8


class Links(NamedTuple):
    """What a rank exchanges over. link_bytes_per_s: inside a node; network_bytes_per_s: between nodes."""

    link_bytes_per_s: float
    network_bytes_per_s: float
    gpus_per_node: int

    def members_per_node(self, layout: Layout, axis: str) -> tuple[int, int]:
        """(ranks of a group on rank 0's node, ranks of the group)."""
        group = layout.group(axis, 0)
        return sum(rank < self.gpus_per_node for rank in group), len(group)

    def crosses(self, layout: Layout, axis: str) -> bool:
        """Whether groups of an axis reach beyond a node."""
        here, size = self.members_per_node(layout, axis)
        return size > here

    def all_to_all_s(self, layout: Layout, buffer_bytes: int) -> float:
        """Of a buffer of which each rank of the ``ep`` group gets an equal part."""
        here, size = self.members_per_node(layout, "ep")
        if size == 1:
            return 0.0
        inside = buffer_bytes * (here - 1) / size / self.link_bytes_per_s
        outside = buffer_bytes * (size - here) / size / self.network_bytes_per_s
        return COLLECTIVE_START_S + max(inside, outside)

    def gather_s(self, layout: Layout, axis: str, gathered_bytes: float) -> float:
        """All-gather into, or reduce-scatter of, ``gathered_bytes`` on each rank of an axis' groups.

        Rings through all ranks: every GPU passes on all but its own part inside the node; of what a node lacks, each
        of its ranks in the group brings in an equal share.
        """
        here, size = self.members_per_node(layout, axis)
        if size == 1 or not gathered_bytes:
            return 0.0
        inside = gathered_bytes * (size - 1) / size / self.link_bytes_per_s if here > 1 else 0.0
        outside = gathered_bytes * (size - here) / size / here / self.network_bytes_per_s
        return COLLECTIVE_START_S + max(inside, outside)
