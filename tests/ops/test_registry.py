"""A backend is taken by name or by the written order, never silently; the reason for a refusal is the message."""

from __future__ import annotations

import dataclasses
import logging
import sys
import textwrap

import pytest
import torch

from megatron_nucleus.core.kernels import KernelConfig, Kernels, resolve_kernels
from megatron_nucleus.core.models.presets import PRESETS
from megatron_nucleus.ops import moe_rows, registry
from megatron_nucleus.ops.table import AUTO_ORDER, ROWS, Row
from megatron_nucleus.utils.errors import ConfigError

TORCH = "megatron_nucleus.ops.moe_rows:combine_rows"


@pytest.fixture
def rows(monkeypatch):
    """The registry with one operation of its own, restored afterwards."""
    monkeypatch.setattr(registry, "_rows", {})
    registry.register(Row("combine", "torch", TORCH, "cpu cuda", "float32 bfloat16", "reference"))
    return registry


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write an importable module and give its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return name

    return write


def test_the_reference_resolves_to_the_function_itself():
    assert registry.resolve("moe_combine", "torch", device_type="cpu") is moe_rows.combine_rows


def test_every_row_names_known_devices_and_dtypes_and_every_operation_has_a_reference():
    for row in ROWS:
        assert set(row.devices.split()) <= {"cpu", "cuda", "meta"}
        assert all(isinstance(getattr(torch, d), torch.dtype) for d in row.dtypes.split())
    for op in registry.operations():
        assert registry.backends(op)[0].backend == "torch"
        assert set(registry.backends(op)[0].devices.split()) == {"cpu", "cuda", "meta"}
    assert all(order[-1] == "torch" for order in AUTO_ORDER.values())


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown operation 'moe_combin' \(did you mean moe_combine\?\)"):
        registry.resolve("moe_combin", device_type="cpu")
    with pytest.raises(
        ConfigError, match=r"no backend 'trition' \(did you mean triton\?\); one of: auto, torch"
    ):
        registry.resolve("moe_combine", "trition", device_type="cpu")


def test_a_named_backend_without_its_library_is_refused_with_reason_and_alternatives(rows, module):
    name = module("needs_absent", "import an_absent_library\n")
    rows.register(Row("combine", "fast", f"{name}:f", "cpu", "float32", ""))
    with pytest.raises(ConfigError) as error:
        rows.resolve("combine", "fast", device_type="cpu")
    expected = "combine backend 'fast' needs an_absent_library, not installed. Usable here: torch."
    assert str(error.value) == expected


def test_a_library_that_breaks_at_import_is_unavailable_not_fatal(rows, module):
    name = module("breaks", "raise RuntimeError('no cuDNN')\n")
    rows.register(Row("combine", "extension", f"{name}:f", "cpu", "float32", ""))
    reason = rows.why_unavailable("combine", "extension", device_type="cpu")
    assert reason == "needs a library that fails to import (RuntimeError: no cuDNN)"
    assert rows.resolve("combine", "auto", device_type="cpu") is moe_rows.combine_rows


def test_device_and_dtype_are_part_of_the_answer(rows, module):
    name = module("gpu_only", "def f(): return 'fast'\n")
    rows.register(Row("combine", "triton", f"{name}:f", "cuda", "bfloat16", ""))
    with pytest.raises(ConfigError, match=r"runs on cuda, not on cpu. Usable here: torch\."):
        rows.resolve("combine", "triton", device_type="cpu")
    with pytest.raises(ConfigError, match="takes bfloat16, not float32"):
        rows.resolve("combine", "triton", device_type="cuda", dtype=torch.float32)
    assert rows.resolve("combine", "triton", device_type="cuda", dtype=torch.bfloat16)() == "fast"
    with pytest.raises(
        ConfigError, match=r"no backend of torch, triton serves device 'cpu' and dtype torch.float64"
    ):
        rows.resolve("combine", "auto", device_type="cpu", dtype=torch.float64)


def test_a_probe_of_the_backend_has_the_last_word(rows, module):
    name = module("probed", "def why_unavailable(device): return f'dislikes {device}'\ndef f(): pass\n")
    rows.register(Row("combine", "picky", f"{name}:f", "cpu", "float32", ""))
    with pytest.raises(ConfigError, match="combine backend 'picky' dislikes cpu"):
        rows.resolve("combine", "picky", device_type="cpu")


SIZES = registry.Sizes(width=64, query_heads=4, kv_heads=2, head_width=16, experts=4, expert_width=32)


def test_a_backend_may_refuse_the_models_sizes_and_is_told_what_is_asked(rows, module):
    text = """
        asked = []
        def why_unavailable(device): return None
        def why_unfit(request):
            asked.append(request)
            wide = request.sizes is not None and request.sizes.head_width > 8
            return f"takes heads of up to 8 channels, the model's have {request.sizes.head_width}" if wide else None
        def f(): return "fast"
    """
    name = module("narrow", textwrap.dedent(text))
    rows.register(Row("combine", "extension", f"{name}:f", "cpu", "float32", ""))
    asked = {"device_type": "cpu", "dtype": torch.float32}
    with pytest.raises(ConfigError) as error:
        rows.resolve("combine", "extension", **asked, sizes=SIZES)
    assert str(error.value) == (
        "combine backend 'extension' takes heads of up to 8 channels, the model's have 16. Usable here: torch."
    )
    assert rows.resolve("combine", "auto", **asked, sizes=SIZES) is moe_rows.combine_rows
    assert rows.resolve("combine", "auto", **asked, sizes=SIZES._replace(head_width=8))() == "fast"
    assert rows.resolve("combine", "extension", **asked)() == "fast"  # without sizes nothing is refused
    first = sys.modules[name].asked[0]
    assert first == registry.Request("combine", "extension", "cpu", torch.float32, SIZES)


def test_a_models_sizes_and_dtype_reach_every_backend(monkeypatch):
    asked = []
    monkeypatch.setattr(registry, "resolve", lambda op, choice, **kw: asked.append((op, choice, kw)))
    resolve_kernels(
        KernelConfig(attention_backend="torch"), "cpu", PRESETS["nucleus_image_17b"], torch.bfloat16
    )
    sizes = registry.Sizes(2048, 16, 4, 128, 64, 1344)  # FACTS of the released model
    assert {op for op, _, _ in asked} == {field.name for field in dataclasses.fields(Kernels)}
    assert {op: choice for op, choice, _ in asked}["attention"] == "torch"
    assert all(kw == {"device_type": "cpu", "dtype": torch.bfloat16, "sizes": sizes} for _, _, kw in asked)


def test_auto_walks_the_written_order_and_logs_one_line(rows, module, caplog):
    name = module("fast_cpu", "def f(): return 'fast'\n")
    rows.register(Row("combine", "extension", f"{name}:f", "cpu", "float32", "C++ for a test"))
    registry._announce.cache_clear()
    with caplog.at_level(logging.INFO, "megatron_nucleus"):
        for _ in range(2):
            assert rows.resolve("combine", "auto", device_type="cpu")() == "fast"
    assert [r.getMessage() for r in caplog.records] == ["combine on cpu: extension (C++ for a test)"]


def test_a_device_without_an_order_gets_the_reference():
    assert registry.resolve("moe_combine", "auto", device_type="meta") is moe_rows.combine_rows


def test_registering_a_pair_twice_is_refused(rows):
    with pytest.raises(ValueError, match="already has a backend 'torch'"):
        rows.register(Row("combine", "torch", TORCH, "cpu", "float32", ""))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("x", name="megatron_nucleus._C"), "needs the C++ extension, not built"),
        (ModuleNotFoundError("x", name="megatron_nucleus._C_cuda"), "needs the CUDA extension, not built"),
        (RuntimeError("operator megatron_nucleus::new does not exist"), "of this version, an older one is built"),
        (ModuleNotFoundError("x", name="apex"), "needs apex, not installed"),
        (AssertionError("no\ncuDNN"), "needs a library that fails to import (AssertionError: no cuDNN)"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(error, reason):
    assert reason in registry.missing(error)
