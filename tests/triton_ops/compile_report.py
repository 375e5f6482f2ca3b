"""Compile Triton kernels at production tile sizes, without a GPU, and print what ptxas used as JSON.

Every kernel for sm_90; the bf16 products, whose tiles come closest to the limits, for sm_80 and sm_100 too.

A program, not a test: kernels are decorated for the compiler or for the interpreter, once per process.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_ops import expert_ffn, gated_residual, layer_norm, moe_rows, norm_rope, swiglu, symmetric
from triton_ops import stochastic_round as rounding

D, K = 2048, 128  # width and head width of nucleus_image_17b
ROWS, WIDTH = layer_norm.tile(D)
WIDEST_ROWS, WIDEST = layer_norm.tile(layer_norm.MAX_WIDTH)
TILE = {"ROWS": moe_rows.ROWS, "COLUMNS": moe_rows.COLUMNS}
BOTH = {"HAS_BASE": True, "HAS_WEIGHT": True}
NORM = {"HAS_PLAIN": True, "ROWS": ROWS, "WIDTH": WIDTH}
NORM_CHUNK = {"CHUNK": layer_norm.CHUNK, **NORM}
NORM_WIDEST = {**NORM_CHUNK, "ROWS": WIDEST_ROWS, "WIDTH": WIDEST}
GATED_WIDEST = {**NORM_WIDEST, "WIDTH": gated_residual.MAX_WIDTH}
GATED_WARPS = gated_residual.warps(gated_residual.MAX_WIDTH)
HEADS = dict(zip(("ROWS", "WIDTH"), norm_rope.tile(K), strict=True))
HEADS_CHUNK = {"CHUNK": norm_rope.CHUNK, **HEADS}
SWIGLU = {"ROWS": swiglu.DEFAULT.rows, "COLUMNS": swiglu.DEFAULT.columns}


class Spec(NamedTuple):
    """blocks: that must fit a multiprocessor together; a second one hides the first one's memory waits."""

    kernel: Any
    constants: dict
    warps: int
    blocks: int = 2
    stages: int = 1
    data: str = "*bf16"


def product(kernel: Any, tile: Any, data: str = "*bf16", **constants: Any) -> Spec:
    """A kernel that fills the tensor cores: one block has all registers, its stages hide the waits."""
    constants = {"DEPTH": tile.depth, "INTERPRET": False, **constants}
    return Spec(kernel, constants, tile.warps, blocks=1, stages=tile.stages, data=data)


def symmetric_of(tile: Any, data: str = "*bf16") -> Spec:
    return product(symmetric.product_kernel, tile, data, HAS_ADDEND=True, SIDE=tile.rows)


def experts_of(tile: Any, data: str = "*bf16") -> Spec:
    sides = {"ROWS": tile.rows, "COLUMNS": tile.columns, "GROUP": expert_ffn.GROUP}
    return product(expert_ffn.gate_up_kernel, tile, data, KEEP=True, **sides)


KERNELS = {
    "gather": Spec(moe_rows.gather_kernel, TILE, moe_rows.WARPS),
    "gather backward": Spec(
        moe_rows.segment_sum_kernel, {**TILE, "HAS_BASE": False, "HAS_WEIGHT": False}, moe_rows.WARPS
    ),
    "combine": Spec(moe_rows.segment_sum_kernel, {**TILE, **BOTH}, moe_rows.WARPS),
    "combine backward": Spec(moe_rows.combine_backward_kernel, TILE, moe_rows.WARPS),
    "layer norm": Spec(layer_norm.forward_kernel, NORM, layer_norm.WARPS),
    "layer norm backward": Spec(layer_norm.backward_kernel, NORM_CHUNK, layer_norm.WARPS),
    "layer norm backward, widest": Spec(layer_norm.backward_kernel, NORM_WIDEST, layer_norm.WARPS, blocks=1),
    "gated residual": Spec(gated_residual.forward_kernel, NORM, gated_residual.warps(WIDTH)),
    "gated residual backward": Spec(gated_residual.backward_kernel, NORM_CHUNK, gated_residual.warps(WIDTH)),
    "gated residual backward, widest": Spec(
        gated_residual.backward_kernel, GATED_WIDEST, GATED_WARPS, blocks=1
    ),
    "norm and rotation": Spec(norm_rope.forward_kernel, HEADS, norm_rope.WARPS),
    "norm and rotation backward": Spec(norm_rope.backward_kernel, HEADS_CHUNK, norm_rope.WARPS),
    "swiglu": Spec(swiglu.forward_kernel, SWIGLU, swiglu.DEFAULT.warps),
    "swiglu backward": Spec(swiglu.backward_kernel, {**SWIGLU, "WITH_OUT": True}, swiglu.DEFAULT.warps),
    # stochastic_round.round_kernel
    "stochastic rounding": Spec(
        rounding.round_kernel, {"PAIRS": rounding.PAIRS}, rounding.WARPS, data="*fp32"
    ),
    "symmetric product": symmetric_of(symmetric.DEFAULT),
    "symmetric product, fp32": symmetric_of(symmetric.DEFAULT_FP32, "*fp32"),
    "experts": experts_of(expert_ffn.DEFAULT),
    "experts, fp32": experts_of(expert_ffn.DEFAULT_FP32, "*fp32"),
}
PRODUCTS = (symmetric.product_kernel, expert_ffn.gate_up_kernel)
TYPES = {"index": "*i64", "order": "*i64", "starts": "*i64", "partial": "*fp32", "rotation": "*fp32"}
TYPES |= {"bits": "*i16"} | dict.fromkeys(("start", "odd", "before", "after"), "i32")
TYPES |= dict.fromkeys(("eps", "alpha", "beta"), "fp32")
SIZES = {"N", "T", "S", "D", "H", "K", "F", "R", "C"}
WIDTHS = SIZES - {"N", "T", "S", "H"}  # of the architecture, multiples of 16


def compile_kernel(spec: Spec, architecture: int) -> dict:
    """Registers per thread, bytes of shared memory, bytes spilled, and warps of one kernel, as at a launch."""
    signature, attributes = {}, {}
    for position, name in enumerate(spec.kernel.arg_names):
        signature[name] = (
            "constexpr" if name in spec.constants else "i32" if name in SIZES else TYPES.get(name, spec.data)
        )
        # With aligned tensors and widths that are multiples of 16 the compiler may use 16-byte accesses.
        if signature[name].startswith("*") or name in WIDTHS:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(spec.kernel, signature=signature, constexprs=spec.constants, attrs=attributes)
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
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
        "warps": spec.warps,
        "blocks": spec.blocks,
        "tensor_core_products": len(re.findall(r"wgmma\.mma_async", compiled.asm["ptx"])),
    }


if __name__ == "__main__":
    products = {name for name, spec in KERNELS.items() if spec.kernel in PRODUCTS and spec.data == "*bf16"}
    wanted = {90: set(KERNELS), 80: products, 100: products}
    print(
        json.dumps(
            {
                arch: {name: compile_kernel(spec, arch) for name, spec in KERNELS.items() if name in names}
                for arch, names in wanted.items()
            }
        )
    )
