"""The model as a ledger: every operation of `core/models/nucleus.py` and the blocks, in the order they run."""

from __future__ import annotations

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.moe.router import capacity
from megatron_nucleus.core.transformer.text import product_pays
from megatron_nucleus.training.planning import library_exchange as library
from megatron_nucleus.training.planning.ledger import (
    COMPLEX_BYTES,
    FP32_BYTES,
    INDEX_BYTES,
    Ledger,
    MicroBatch,
    Numerics,
)


def stem(shape: ModelShape, batch: MicroBatch, numerics: Numerics) -> Ledger:
    """From latents, noise level and text to the first block: ``x``, ``temb``, ``act`` and ``text``."""
    B, D, P, U = batch.images, shape.width, shape.patch_channels, shape.text_dim
    out = Ledger(numerics)
    out.tensor("latents", B * batch.tokens * P)
    out.linear("image_in", "latents", "x", B * batch.tokens, P, D, constant=("latents",))
    out.tensor("sinusoid", B * D)
    out.linear("time_1", "sinusoid", "time_hidden", B, D, 4 * D, constant=("sinusoid",))
    out.tensor("time_act", B * 4 * D)
    out.add("time_silu", "memory", ("time_hidden",), ("time_act",), saves=("time_hidden",))
    out.linear("time_2", "time_act", "time_out", B, 4 * D, D)
    rms_norm(out, "time_norm", "time_out", out.tensor("temb", B * D, numerics.norm_bytes))
    out.tensor("act", B * D, numerics.norm_bytes)
    out.add("act_silu", "memory", ("temb",), ("act",), saves=("temb",))
    # Text of a frozen encoder needs no gradient; its norm's weight is folded into each block's first projection.
    out.tensor("raw_text", B * batch.text_tokens * U, FP32_BYTES)
    out.tensor("text", B * batch.text_tokens * U)
    inner = (out.tensor("text_wide", B * batch.text_tokens * U, FP32_BYTES),) if numerics.bf16 else ()
    out.add(
        "text_norm",
        "memory",
        ("raw_text",),
        ("text",),
        constant=("raw_text",),
        saves=("raw_text", "text"),
        inner=inner,
    )
    angles = (batch.tokens + batch.text_tokens) * shape.attention_head_dim // 2
    out.tensor("rotations", angles, COMPLEX_BYTES)
    out.add("rotations", "memory", (), ("rotations",), saves=("rotations",))
    return out


def block(shape: ModelShape, layer: int, batch: MicroBatch, numerics: Numerics) -> Ledger:
    """One transformer block: ``x`` to ``x_next``."""
    B, D = batch.images, shape.width
    out = Ledger(numerics, outside=("temb", "act", "text"))
    out.bytes |= {name: stem(shape, batch, numerics).bytes[name] for name in ("temb", "act", "text")}
    stream = out.tensor("x", B * batch.tokens * D)
    out.linear("modulation", "act", "modulated_by", B, D, 4 * D)
    _text(out, shape, batch)
    modulated_norm(out, "norm_1", stream, "m1", batch, D)
    _attention(out, shape, batch)
    _second_norm(out, batch, D, with_plain=shape.is_moe(layer) and shape.decoupled_routing)
    if shape.is_moe(layer):
        _moe(out, shape, layer, batch)
    else:
        feed_forward(out, "ffn", "m2", "out", B * batch.tokens, D, shape.dense_hidden, "ffn")
    out.tensor("x_next", B * batch.tokens * D)
    out.add(
        "residual_2", "memory", ("x_mid", "out", "gates"), ("x_next",),
        saves=("out", "gates"), same_grad=("x_mid",),
    )  # fmt: skip
    return out


def head(shape: ModelShape, batch: MicroBatch, numerics: Numerics) -> Ledger:
    """From the last block to the loss."""
    B, D, P = batch.images, shape.width, shape.patch_channels
    rows = B * batch.tokens
    out = Ledger(numerics, outside=("act",))
    out.bytes["act"] = stem(shape, batch, numerics).bytes["act"]
    out.tensor("x", rows * D)
    out.linear("out_modulation", "act", "modulated_by", B, D, 2 * D)
    modulated_norm(out, "norm_out", "x", "m", batch, D)
    out.tensor("shifted", rows * D)
    out.add("shift", "memory", ("m", "modulated_by"), ("shifted",), same_grad=("m",))
    out.linear("image_out", "shifted", "velocity", rows, D, P)
    # The loss is formed in fp32: the difference to the target is kept for its square.
    out.tensor("error", rows * P, FP32_BYTES)
    out.add("loss", "memory", ("velocity",), (), saves=("error",), inner=("error",))
    return out


def rms_norm(out: Ledger, name: str, source: str, target: str) -> None:
    """RMSNorm of vectors; of negligible size beside everything else, so only its input is counted."""
    out.add(name, "memory", (source,), (target,), saves=(source,))


def modulated_norm(out: Ledger, name: str, source: str, target: str, batch: MicroBatch, D: int) -> None:
    """`ops.norm.modulated_layer_norm`; ``modulated_by`` holds the scale."""
    rows = batch.images * batch.tokens
    out.tensor(target, rows * D)
    inner = (out.tensor(f"{name}_scale", batch.images * D),)
    if not out.fused("modulated_layer_norm"):
        inner += (out.tensor(f"{name}_plain", rows * D), out.tensor(f"{name}_moments", 2 * rows))
    out.add(name, "memory", (source, "modulated_by"), (target,), saves=(source, *inner), inner=inner)


def _second_norm(out: Ledger, batch: MicroBatch, D: int, with_plain: bool) -> None:
    """`ops.norm.gated_residual_norm` and the two bounded gates."""
    B, rows = batch.images, batch.images * batch.tokens
    out.tensor("gates", 2 * B * D)
    out.add("gates", "memory", ("modulated_by",), ("gates",), saves=("modulated_by", "gates"))
    for name in ("x_mid", "m2"):
        out.tensor(name, rows * D)
    plain = (out.tensor("plain", rows * D),) if with_plain else ()
    reads = ("x", "branch", "gates", "modulated_by")
    inner = (out.tensor("norm_2_scale", B * D),)
    saves = ("x_mid", "branch", "gates")
    if not out.fused("gated_residual_norm"):
        inner += () if with_plain else (out.tensor("norm_2_plain", rows * D),)
        inner += (out.tensor("norm_2_moments", 2 * rows),)
        saves += plain
    out.add("norm_2", "memory", reads, ("x_mid", "m2", *plain), saves=(*saves, *inner), inner=inner)


def _text(out: Ledger, shape: ModelShape, batch: MicroBatch) -> None:
    """Text keys and values, by way of `core/transformer/text.py`."""
    rows, U, D = batch.images * batch.text_tokens, shape.text_dim, shape.width
    M = 2 * shape.num_key_value_heads * shape.attention_head_dim
    inner = [out.tensor("text_rows", M * D)]
    if product_pays(rows, U, D, M):
        # The features need no gradient, so the product is not saved, only what it is made of.
        inner.append(out.tensor("text_scaled", D * U))
        scratch = (out.tensor("text_product", M * U),)
        flops = 2 * M * D * U + 2 * rows * U * M
        grad_flops = 2 * rows * U * M + 2 * 2 * M * D * U
    else:
        inner.append(out.tensor("text_hidden", rows * D))
        scratch = (out.tensor("text_scaled", D * U),)
        flops = 2 * rows * (U * D + D * M)
        grad_flops = 2 * rows * (U * D + 2 * D * M)
    out.tensor("text_kv", rows * M)
    out.add(
        "text", "matmul", ("text",), ("text_kv",), saves=("text", *inner), inner=(*inner, *scratch), result="costly",
        constant=("text",), flops=flops, grad_flops=grad_flops, weight_values=D * U + M * D,
        recorded=("text_kv", "text_product" if "text_product" in scratch else "text_hidden"),
    )  # fmt: skip
    # Keys are a part of what the product gave; a fused kernel takes them as a tensor of their own.
    keys = out.tensor("text_key_part", rows * M // 2, out.numerics.norm_bytes)
    if out.fused("norm_rope"):
        out.add("text_key_part", "memory", ("text_kv",), (keys,))
        _norm_rope(out, shape, "text_rope", keys, "text_k", rows * M // 2, out.numerics.norm_bytes)
    else:
        _norm_rope(out, shape, "text_rope", "text_kv", "text_k", rows * M // 2, out.numerics.bytes)


def _norm_rope(
    out: Ledger, shape: ModelShape, name: str, source: str, target: str, values: int, source_bytes: int
) -> None:
    """`ops.norm_rope.norm_rope` of ``values`` values of ``source``."""
    wide = out.numerics.norm_bytes
    out.tensor(target, values, wide)
    if out.fused("norm_rope"):
        inner = () if wide == source_bytes else (out.tensor(f"{name}_wide", values, wide),)
        saves = inner or (source,)
    else:
        inner = (
            out.tensor(f"{name}_normal", values, wide),
            out.tensor(f"{name}_rms", values // shape.attention_head_dim, FP32_BYTES),
        )
        if out.numerics.bf16:
            inner += (out.tensor(f"{name}_wide", values, FP32_BYTES),)
        saves = (source, *inner)
    out.add(name, "memory", (source,), (target,), saves=saves, inner=inner)


def _attention(out: Ledger, shape: ModelShape, batch: MicroBatch) -> None:
    B, S, L, D = batch.images, batch.tokens, batch.text_tokens, shape.width
    rows, kv = B * S, shape.num_key_value_heads * shape.attention_head_dim
    out.linear("q", "m1", "q_lin", rows, D, D, layer="attention")
    out.linear("k", "m1", "k_lin", rows, D, kv, layer="attention")
    out.linear("v", "m1", "v_lin", rows, D, kv, layer="attention")
    _norm_rope(out, shape, "rope_q", "q_lin", "q_rot", rows * D, out.numerics.bytes)
    _norm_rope(out, shape, "rope_k", "k_lin", "k_rot", rows * kv, out.numerics.bytes)
    wide = out.numerics.norm_bytes
    out.tensor("keys", B * (S + L) * kv, wide)
    out.tensor("values", B * (S + L) * kv)
    out.add("keys", "memory", ("k_rot", "text_k"), ("keys",), same_grad=("k_rot", "text_k"))
    out.add("values", "memory", ("v_lin", "text_kv"), ("values",), same_grad=("v_lin", "text_kv"))
    out.tensor("attended", rows * D)
    inner = (out.tensor("logsumexp", rows * shape.num_attention_heads, FP32_BYTES),)
    saves = ("q_rot", "keys")
    if wide != out.numerics.bytes:  # autocast's copies of what the norms gave in fp32
        saves = (out.tensor("q_cast", rows * D), out.tensor("keys_cast", B * (S + L) * kv))
        inner += saves
    flops = 2 * 2 * B * S * (S + L) * D
    # Backward: the scores again, then the gradients of values, scores, queries and keys: five products for two.
    out.add(
        "attention", "attention", ("q_rot", "keys", "values"), ("attended",), result="costly",
        saves=(*saves, "values", "attended", "logsumexp"), inner=inner, flops=flops, grad_flops=flops * 5 // 2,
        recorded=("attended", "logsumexp"),
    )  # fmt: skip
    out.linear("attention_out", "attended", "branch", rows, D, D, layer="attention")


def feed_forward(
    out: Ledger, name: str, source: str, target: str, rows: int, D: int, F: int, layer: str, experts: int = 0
) -> None:
    """SwiGLU feed-forward over ``rows`` rows.

    Args:
        layer: of `precision.LAYERS`. experts: how many share the rows, 0 = a feed-forward of its own.
    """
    op, weights = ("expert_ffn", experts) if experts else ("swiglu", 1)
    gate_up, hidden = f"{name}_gate_up", f"{name}_hidden"
    out.linear(f"{name}_in", source, gate_up, rows, D, 2 * F, weight_values=weights * 2 * D * F, layer=layer)
    inner = () if out.fused(op) else (out.tensor(f"{name}_silu", rows * F),)
    out.tensor(hidden, rows * F)
    out.add(f"{name}_swiglu", "memory", (gate_up,), (hidden,), saves=(gate_up, *inner), inner=inner)
    # Rows that a plain all-to-all takes home are weighted there: no gradient reads them here.
    passing = experts and out.numerics.ep > 1 and out.numerics.exchange == "alltoall"
    result = "passing" if passing else "costly"
    out.linear(
        f"{name}_out", hidden, target, rows, F, D, weight_values=weights * D * F, layer=layer, result=result
    )


def _moe(out: Ledger, shape: ModelShape, layer: int, batch: MicroBatch) -> None:
    """Router, shared expert and routed experts, whatever carries the tokens."""
    B, D, E, F = batch.images, shape.width, shape.num_experts, shape.moe_intermediate_dim
    tokens = B * batch.tokens
    rows = B * E * capacity(shape.capacity_factors[layer], batch.tokens, E)
    local = E // out.numerics.ep
    _router(out, shape, batch, rows)
    by_library = out.numerics.ep > 1 and out.numerics.exchange != "alltoall"
    arrived = library.dispatch(out, tokens, rows, D, E) if by_library else _dispatch(out, rows, D)
    feed_forward(out, "shared", "m2", "shared_out", tokens, D, F, "shared_experts")
    if by_library:
        feed_forward(out, "expert", arrived, "expert_out", rows, D, F, "experts", experts=local)
        library.give_back(out, tokens, rows, D, E)
        return
    if out.numerics.ep > 1 and local > 1:
        arrived = _copied(out, "by_expert", arrived, rows * D)
    feed_forward(out, "expert", arrived, "expert_out", rows, D, F, "experts", experts=local)
    back = "expert_out"
    if out.numerics.ep > 1:
        if local > 1:
            back = _copied(out, "by_rank", back, rows * D)
        back = _exchange(out, "return", back, rows * D)
        if out.numerics.chunks > 1:
            back = _copied(out, "all_pieces", back, rows * D)
    _combine(out, back, rows, tokens, D)


def _dispatch(out: Ledger, rows: int, D: int) -> str:
    """Rows in destination order and, over several ranks, their way."""
    out.tensor("rows", rows * D)
    out.tensor("gather_index", rows, INDEX_BYTES)
    out.add(
        "gather", "memory", ("m2", "index"), ("rows",), saves=("gather_index",), inner=("gather_index",),
        constant=("index",),
    )  # fmt: skip
    return _exchange(out, "dispatch", "rows", rows * D) if out.numerics.ep > 1 else "rows"


def _router(out: Ledger, shape: ModelShape, batch: MicroBatch, rows: int) -> None:
    """Scores and choice; the time embedding's half of the scores is formed once per image."""
    B, D, E = batch.images, shape.width, shape.num_experts
    tokens = B * batch.tokens
    judged = "plain" if shape.decoupled_routing else "m2"
    out.linear("router_time", "temb", "time_scores", B, D, E)
    out.linear("router", judged, "token_scores", tokens, D, E)
    out.tensor("logits", tokens * E)
    out.add("scores", "memory", ("token_scores", "time_scores"), ("logits",), same_grad=("token_scores",))
    # Held to the end of the forward pass: the losses and the routing figures read them.
    out.tensor("logits_fp32", tokens * E if out.numerics.bf16 else 0, FP32_BYTES)
    out.tensor("index", rows, INDEX_BYTES)
    out.tensor("weight", rows)
    inner = (
        out.tensor("softmax", tokens * E, FP32_BYTES),
        out.tensor("taken_score", rows),
        out.tensor("taken_total", rows),
        out.tensor("taken_sum", tokens),
    )
    held = ("logits_fp32",) if out.numerics.bf16 else ("logits",)
    out.add(
        "expert_choice", "memory", ("logits",), ("index", "weight"), result="kept",
        saves=(*inner, "index", "weight", *held), inner=(*inner, "logits_fp32"),
    )  # fmt: skip


def _exchange(out: Ledger, name: str, source: str, values: int) -> str:
    arrived = out.tensor(f"{name}_arrived", values)
    out.add(name, "exchange", (source,), (arrived,), result="kept")
    return arrived


def _copied(out: Ledger, name: str, source: str, values: int) -> str:
    copy = out.tensor(name, values)
    out.add(name, "memory", (source,), (copy,))
    return copy


def _combine(out: Ledger, rows_back: str, rows: int, tokens: int, D: int) -> None:
    """`ops.moe_rows.combine_rows`."""
    out.tensor("out", tokens * D)
    inner = (out.tensor("combine_index", rows, INDEX_BYTES), out.tensor("combine_weight", rows))
    saves = (*inner, rows_back)
    if not out.fused("moe_combine"):
        inner += (out.tensor("product", rows * D, FP32_BYTES),)
        if out.numerics.bf16:
            inner += (out.tensor("rows_wide", rows * D, FP32_BYTES),)
        saves = inner if out.numerics.bf16 else (*inner, rows_back)
    out.add(
        "combine", "memory", ("shared_out", rows_back, "weight"), ("out",), saves=saves, inner=inner,
        same_grad=("shared_out",),
    )  # fmt: skip
