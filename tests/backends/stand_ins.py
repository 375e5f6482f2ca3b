"""Libraries made of plain torch with the recorded signatures, for adapters whose libraries are not installed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from megatron_nucleus.backends import recorded


def function_of(call: recorded.Call, body: Callable[[dict], object]) -> Callable:
    """A function that binds its arguments as ``call.signature`` says and hands them to ``body`` by name.

    A signature without names stands for a compiled function: the arguments come by position, as "0", "1", ...
    """
    words = call.signature.split()
    kinds = inspect.Parameter
    if "/" in words:
        words = [f"arg{i}" for i in range(len(words))]
        parameters = [kinds(word, kinds.POSITIONAL_ONLY) for word in words]
    else:
        parameters = [
            kinds(
                word.strip("*="),
                kinds.KEYWORD_ONLY if word.startswith("*") else kinds.POSITIONAL_OR_KEYWORD,
                default=None if word.endswith("=") else kinds.empty,
            )
            for word in words
        ]
    signature = inspect.Signature(parameters)

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return body(bound.arguments)

    function.__signature__ = signature
    function.__name__ = call.name.split(".")[-1]
    return function


def module_of(name: str, bodies: dict[str, Callable[[dict], object]]) -> ModuleType:
    """A module with the recorded functions of library ``name``; bodies by `recorded.Call.name`."""
    entry = recorded.library(name)
    module = ModuleType(entry.module)
    for call in entry.calls:
        owner = module
        *classes, last = call.name.split(".")
        for each in classes:
            if not hasattr(owner, each):
                setattr(owner, each, type(each, (), {}))
            owner = getattr(owner, each)
        setattr(owner, last, function_of(call, bodies[call.name]))
    return module


def install(monkeypatch, module: ModuleType) -> ModuleType:
    """Make ``import module`` find it, parents included."""
    name = module.__name__
    monkeypatch.setitem(sys.modules, name, module)
    while "." in name:
        child, (name, _, last) = sys.modules[name], name.rpartition(".")
        parent = ModuleType(name)
        setattr(parent, last, child)
        monkeypatch.setitem(sys.modules, name, parent)
    return module


def attend(q_SHK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> Tensor:
    """Softmax attention of one sequence, [S, H, K], in fp64, every score in memory."""
    repeats = q_SHK.shape[1] // k_TGK.shape[1]
    q, k, v = (t.double() for t in (q_SHK, k_TGK, v_TGK))
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = torch.einsum("shk,thk->hst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hst,thk->shk", scores.softmax(-1), v).to(q_SHK.dtype)


def dense(a: dict) -> Tensor:
    """What ``flash_attn_func`` of every version returns, its second value aside."""
    q, k, v = a["q"], a["k"], a["v"]
    _check_heads(q, k, v)
    assert q.shape[0] == k.shape[0]
    return torch.stack([attend(*row) for row in zip(q, k, v, strict=True)])


def variable(a: dict) -> Tensor:
    """What ``flash_attn_varlen_func`` of every version returns, its second value aside."""
    q, k, v = a["q"], a["k"], a["v"]
    _check_heads(q, k, v)
    for bounds, total in ((a["cu_seqlens_q"], q.shape[0]), (a["cu_seqlens_k"], k.shape[0])):
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        assert bounds[0] == 0
        assert bounds[-1] == total
        assert (bounds.diff() >= 0).all()
    queries, keys = a["cu_seqlens_q"].tolist(), a["cu_seqlens_k"].tolist()
    assert len(queries) == len(keys)
    parts = []
    for i in range(len(queries) - 1):
        row_q, row_k = q[queries[i] : queries[i + 1]], k[keys[i] : keys[i + 1]]
        assert len(row_q) <= a["max_seqlen_q"]
        assert len(row_k) <= a["max_seqlen_k"]
        if len(row_q):
            parts.append(attend(row_q, row_k, v[keys[i] : keys[i + 1]]))
    return torch.cat(parts)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert k.shape == v.shape
    assert q.shape[-2] % k.shape[-2] == 0
    assert q.shape[-1] == k.shape[-1]
