"""Compile every Triton kernel for sm_90 at production tile sizes, without a GPU, and print what ptxas used as JSON.

A program, not a test: kernels are decorated for the compiler or for the interpreter, once per process.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_ops import layer_norm, moe_rows

D = 2048  # width of nucleus_image_17b
ROWS, WIDTH = layer_norm.tile(D)
WIDEST_ROWS, WIDEST = layer_norm.tile(layer_norm.MAX_WIDTH)
TILE = {"ROWS": moe_rows.ROWS, "COLUMNS": moe_rows.COLUMNS}
BOTH = {"HAS_BASE": True, "HAS_WEIGHT": True}

# name: (kernel, constants, warps)
KERNELS = {
    "gather": (moe_rows.gather_kernel, TILE, moe_rows.WARPS),
    "gather backward": (
        moe_rows.segment_sum_kernel,
        {**TILE, "HAS_BASE": False, "HAS_WEIGHT": False},
        moe_rows.WARPS,
    ),
    "combine": (moe_rows.segment_sum_kernel, {**TILE, **BOTH}, moe_rows.WARPS),
    "combine backward": (moe_rows.combine_backward_kernel, TILE, moe_rows.WARPS),
    "layer norm": (
        layer_norm.forward_kernel,
        {"HAS_PLAIN": True, "ROWS": ROWS, "WIDTH": WIDTH},
        layer_norm.WARPS,
    ),
    "layer norm backward": (
        layer_norm.backward_kernel,
        {"HAS_PLAIN": True, "CHUNK": layer_norm.CHUNK, "ROWS": ROWS, "WIDTH": WIDTH},
        layer_norm.WARPS,
    ),
    "layer norm backward, widest": (
        layer_norm.backward_kernel,
        {"HAS_PLAIN": True, "CHUNK": layer_norm.CHUNK, "ROWS": WIDEST_ROWS, "WIDTH": WIDEST},
        layer_norm.WARPS,
    ),
}
TYPES = {"index": "*i64", "order": "*i64", "starts": "*i64", "partial": "*fp32", "eps": "fp32"}
SIZES = {"N", "T", "S", "D"}


def compile_kernel(kernel, constants: dict, warps: int) -> dict:
    """Registers per thread, bytes of shared memory, bytes spilled, and warps of one kernel on bf16 data."""
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = (
            "constexpr" if name in constants else "i32" if name in SIZES else TYPES.get(name, "*bf16")
        )
        # As at a launch with aligned tensors and D = 2048: the compiler may use 16-byte accesses.
        if signature[name].startswith("*") or name == "D":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": counts["REG"],
        "spilled_bytes": counts["STACK"] + counts["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "warps": warps,
    }


if __name__ == "__main__":
    print(json.dumps({name: compile_kernel(*spec) for name, spec in KERNELS.items()}))
