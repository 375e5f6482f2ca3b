"""The FlashAttention adapter against the reference, through stand-ins with the recorded signatures."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_nucleus.backends import flash_attn, recorded, sdpa
from megatron_nucleus.backends.key_lengths import as_sequences, key_lengths
from megatron_nucleus.ops import attention, registry
from megatron_nucleus.utils.errors import ConfigError
from tests.backends import stand_ins
from tests.ops.op_cases import CASES, Inputs, outputs_and_gradients
from tests.ops.test_parity import assert_near

SIZES = registry.Sizes(width=2048, query_heads=16, kv_heads=4, head_width=128, experts=64, expert_width=1344)
FUNCTIONS = {2: flash_attn.attention_2, 3: flash_attn.attention_3, 4: flash_attn.attention_4}


@pytest.fixture
def libraries(monkeypatch):
    """Install stand-ins of some versions; all others are missing. Returns what the calls were given, in order."""
    given = []

    def note(body, version):
        def call(arguments):
            given.append(arguments)
            out = body(arguments)
            return (out, None) if version == 4 else out

        return call

    def install(*versions):
        flash_attn._import.cache_clear()
        flash_attn._chosen.cache_clear()
        for version in (2, 3, 4):
            entry = recorded.library(f"flash_attn_{version}")
            monkeypatch.setitem(sys.modules, entry.module, None)  # importing it raises ModuleNotFoundError
        for version in versions:
            module = stand_ins.module_of(
                f"flash_attn_{version}",
                {
                    "flash_attn_func": note(stand_ins.dense, version),
                    "flash_attn_varlen_func": note(stand_ins.variable, version),
                },
            )
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return given

    yield install
    flash_attn._import.cache_clear()
    flash_attn._chosen.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to a GPU of some compute capability."""

    def pretend(major: int, minor: int = 0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(sdpa, "_refusal", lambda *asked: "asks the GPU")  # what torch would do there

    return pretend


def why(backend: str, **kwargs) -> str | None:
    asked = {"device_type": "cuda", "dtype": torch.bfloat16, "sizes": SIZES} | kwargs
    return registry.why_unavailable("attention", backend, **asked)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES["attention"])
def test_every_version_equals_the_reference(libraries, version, dtype, case):
    given = libraries(version)
    args = CASES["attention"][case](Inputs(dtype))
    outputs, gradients = outputs_and_gradients(FUNCTIONS[version], args)
    wide = tuple(
        a.detach().double().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
        for a in args
    )
    expected, expected_gradients = outputs_and_gradients(attention.attention, wide)
    for got, want in zip(outputs + gradients, expected + expected_gradients, strict=True):
        assert got.dtype == dtype
        assert_near(got, want, attention.TOLERANCES[dtype], case)
    assert given[0]["k"].shape[-2:] == args[1].shape[-2:]  # grouped heads went in as they are


def test_padding_becomes_sequences_without_queries():
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    assert key_lengths(mask).tolist() == [5, 3, 1]
    sequences = as_sequences(mask, 4)
    assert sequences.query_bounds.tolist() == [0, 4, 4, 8, 8, 12, 12]
    assert sequences.key_bounds.tolist() == [0, 5, 5, 8, 10, 11, 15]
    assert (sequences.longest_query, sequences.longest_key) == (4, 5)


def test_lengths_come_from_shapes_and_the_device_alone():
    """On the meta device there are no values that a host could wait for."""
    mask = torch.ones(3, 7, dtype=torch.bool, device="meta")
    sequences = as_sequences(mask, 4)
    assert sequences.key_bounds.shape == sequences.query_bounds.shape == (7,)
    assert sequences.key_bounds.dtype == sequences.query_bounds.dtype == torch.int32


def test_another_order_of_keys_is_refused():
    mask = torch.tensor([[True, True, True], [True, False, True]])
    with pytest.raises(RuntimeError, match="must stand first in every row .* --attention-backend torch"):
        key_lengths(mask)


def test_padding_has_no_influence_whatever_it_holds(libraries):
    libraries(2)
    x = Inputs(torch.float32)
    q, k, v, mask = x(2, 5, 4, 8), x(2, 9, 2, 8), x(2, 9, 2, 8), torch.arange(9) < torch.tensor([[9], [6]])
    poisoned = [t.detach().clone() for t in (k, v)]
    for t in poisoned:
        t[1, 6:] = float("nan")
        t.requires_grad_()
    outputs, gradients = outputs_and_gradients(flash_attn.attention_2, (q, *poisoned, mask))
    clean, clean_gradients = outputs_and_gradients(flash_attn.attention_2, (q, k, v, mask))
    for got, want in zip(outputs + gradients, clean + clean_gradients, strict=True):
        assert torch.equal(got, want)
    assert not gradients[1][1, 6:].any()


def test_keys_are_not_copied(libraries):
    given = libraries(3)
    x = Inputs(torch.float32)
    q, k, v = x(2, 5, 4, 8), x(2, 9, 2, 8), x(2, 9, 2, 8)
    flash_attn.attention_3(q, k, v, torch.ones(2, 9, dtype=torch.bool))
    assert [given[0][n].data_ptr() for n in "qkv"] == [t.data_ptr() for t in (q, k, v)]


def test_autocast_is_followed_as_torch_attention_follows_it(libraries):
    given = libraries(2)
    x = Inputs(torch.float32)
    q, k, v = x(1, 4, 2, 8), x(1, 6, 2, 8), x(1, 6, 2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn.attention_2(q, k, v)
    assert {given[0][n].dtype for n in "qkv"} == {torch.bfloat16} == {out.dtype}


@pytest.mark.parametrize("wanted", [False, True])
def test_torchs_switch_for_determinism_reaches_the_library(libraries, wanted):
    given = libraries(4)
    x = Inputs(torch.float32)
    args = x(1, 4, 2, 8), x(1, 6, 2, 8), x(1, 6, 2, 8)
    try:
        torch.use_deterministic_algorithms(wanted)
        flash_attn.attention_4(*args)
        flash_attn.attention_4(*args, torch.ones(1, 6, dtype=torch.bool))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [a["deterministic"] for a in given] == [wanted, wanted]


@pytest.mark.parametrize(
    ("capability", "installed", "taken"),
    [((9, 0), (2, 3, 4), 3), ((9, 0), (2, 4), 4), ((9, 0), (2,), 2), ((8, 0), (2, 4), 2), ((10, 0), (2, 3, 4), 4),
     ((12, 0), (2,), 2)],
)  # fmt: skip
def test_without_a_number_the_version_for_the_gpu_is_taken(libraries, gpu, capability, installed, taken):
    libraries(*installed)
    gpu(*capability)
    assert why("flash_attn") is None
    assert flash_attn._chosen() == taken


def test_reasons_name_what_does_not_fit(libraries, gpu):
    libraries(2, 3, 4)
    gpu(10)
    assert why("flash_attn_3") == "needs compute capability 9.0 to 9.0, this GPU has 10.0"
    gpu(8)
    assert why("flash_attn_4") == "needs compute capability 9.0 to 12.9, this GPU has 8.0"
    gpu(7, 5)
    assert why("flash_attn") == "needs compute capability 8.0 or higher, this GPU has 7.5"
    gpu(9)
    odd = SIZES._replace(head_width=20)
    expected = "takes heads of up to 256 channels in multiples of 8, the model's have 20"
    assert why("flash_attn_2", sizes=odd) == expected
    assert why("flash_attn_2", dtype=torch.float32) == "takes bfloat16, float16, not float32"
    gpu(10)
    wide = SIZES._replace(head_width=192)
    assert "up to 128 or of 256 channels on this GPU, the model's have 192" in why("flash_attn_4", sizes=wide)
    assert why("flash_attn_4", sizes=SIZES._replace(head_width=256)) is None


def test_a_named_version_that_is_missing_is_an_error_with_alternatives(libraries, gpu):
    libraries(2)
    gpu(9)
    with pytest.raises(ConfigError) as error:
        registry.resolve("attention", "flash_attn_3", device_type="cuda", dtype=torch.bfloat16, sizes=SIZES)
    assert str(error.value) == (
        "attention backend 'flash_attn_3' needs flash_attn_interface, not installed. "
        "Usable here: torch, flash_attn, flash_attn_2."
    )


def test_no_version_at_all_says_what_each_lacks(libraries, gpu):
    libraries()
    gpu(9)
    assert why("flash_attn") == (
        "version 3 needs flash_attn_interface, not installed; version 4 needs flash_attn.cute, not installed; "
        "version 2 needs flash_attn.flash_attn_interface, not installed"
    )


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
         "needs flash_attn_interface.flash_attn_varlen_func with deterministic, which this version does not take"),
        ("q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k plan deterministic=",
         "calls flash_attn_interface.flash_attn_varlen_func without plan, which this version requires"),
        (None, "needs flash_attn_interface.flash_attn_varlen_func, which this version does not have"),
    ],
)  # fmt: skip
def test_drift_of_a_library_shows_before_the_first_step(libraries, gpu, signature, reason):
    libraries(3)
    gpu(9)
    library = sys.modules["flash_attn_interface"]
    if signature is None:
        del library.flash_attn_varlen_func
    else:
        call = recorded.Call("flash_attn_varlen_func", signature, "")
        library.flash_attn_varlen_func = stand_ins.function_of(call, stand_ins.variable)
    assert why("flash_attn_3") == reason
