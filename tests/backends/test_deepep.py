"""DeepEP's adapter: its recorded calls against what a library offers, and why one cannot serve."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

from megatron_nucleus.backends import recorded
from tests.backends import deepep_emulation

LEGACY, ELASTIC, HYBRID = (recorded.library(name).calls for name in ("deepep Buffer", "deepep", "hybridep"))
CALLS = [*LEGACY, *ELASTIC, *HYBRID]
CLASSES = ("Buffer", "ElasticBuffer", "HybridEPBuffer")


@pytest.fixture
def install():
    """`deepep_emulation.install`, undone afterwards."""
    names = ("deep_ep", "megatron_nucleus.backends.deepep")
    before = {name: sys.modules.pop(name, None) for name in names}
    yield deepep_emulation.install
    for name in names:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]


def library(**classes: type) -> types.ModuleType:
    """The stand-in with some of its classes replaced."""
    module = types.ModuleType("deep_ep")
    for name in CLASSES:
        setattr(module, name, classes.get(name, getattr(deepep_emulation, name)))
    return module


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.name)
def test_the_stand_in_has_the_recorded_signatures(call):
    owner, method = call.name.split(".")
    assert recorded.signature_of(getattr(getattr(deepep_emulation, owner), method)) == call.signature


def changed(owner: str, method: str, change) -> types.ModuleType:
    """The stand-in, with the parameters of one method changed."""
    cls = getattr(deepep_emulation, owner)
    function = getattr(cls, method)
    signature = inspect.signature(function)
    parameters = change(dict(signature.parameters))

    def replacement(*args, **kwargs):
        raise AssertionError("only its signature is looked at")

    ordered = sorted(parameters.values(), key=lambda p: p.kind)
    replacement.__signature__ = signature.replace(parameters=ordered)
    return library(**{owner: type(owner, (cls,), {method: replacement})})


EXTRA = {"extra": inspect.Parameter("extra", inspect.Parameter.KEYWORD_ONLY, default=None)}


def without(name):
    return lambda parameters: {n: p for n, p in parameters.items() if n != name}


def requiring(name):
    added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    return lambda parameters: parameters | {name: added}


def test_a_signature_that_fits_is_no_drift():
    for calls in (LEGACY, ELASTIC, HYBRID):
        assert recorded.drift(library(), calls) is None
    # another order, and one more argument that has a default
    more = changed(
        "HybridEPBuffer", "combine_with_unpermute", lambda p: {**dict(reversed(p.items())), **EXTRA}
    )
    assert recorded.drift(more, HYBRID) is None


@pytest.mark.parametrize(
    ("owner", "method", "change", "calls", "reason"),
    [
        (
            "ElasticBuffer", "dispatch", without("do_cpu_sync"), ELASTIC,
            "needs deep_ep.ElasticBuffer.dispatch with do_cpu_sync, which this version does not take",
        ),
        (
            "Buffer", "combine", requiring("layout"), LEGACY,
            "calls deep_ep.Buffer.combine without layout, which this version requires",
        ),
        (
            "HybridEPBuffer", "__init__", without("num_local_experts"), HYBRID,
            "needs deep_ep.HybridEPBuffer.__init__ with num_local_experts, which this version does not take",
        ),
    ],
)  # fmt: skip
def test_drift_names_the_call_and_the_argument(owner, method, change, calls, reason):
    assert recorded.drift(changed(owner, method, change), calls) == reason


def test_a_missing_class_is_named():
    module = library()
    del module.HybridEPBuffer
    expected = "needs deep_ep.HybridEPBuffer.__init__, which this version does not have"
    assert recorded.drift(module, HYBRID) == expected


def test_a_cpu_is_refused(install):
    assert install("ElasticBuffer").why_unavailable("cpu") == "runs on cuda, not on cpu"


@pytest.mark.parametrize(
    ("visible", "capability", "home", "reason"),
    [
        (False, (9, 0), "/cuda", "needs an NVIDIA GPU, none is visible"),
        (True, (8, 0), "/cuda", "needs compute capability 9.0 or higher, this GPU has 8.0"),
        (True, (9, 0), None, "finds no nvcc"),
        (True, (9, 0), "/cuda", None),
        (True, (10, 0), "/cuda", None),
    ],
)
def test_the_machine_is_judged(visible, capability, home, reason, install, monkeypatch):
    backend = install("ElasticBuffer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(backend.cpp_extension, "CUDA_HOME", home)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    found = backend.why_unavailable("cuda")
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("torch_version", "nccl", "width", "reason"),
    [
        ("2.9.1+cu130", (2, 30, 4), 1024, "needs torch 2.10 or newer, this is 2.9.1+cu130"),
        ("2.13.0", (2, 28, 9), 1024, "needs NCCL 2.30.4 or newer, this is 2.28.9"),
        ("2.13.0", (2, 30, 4), 1000, "needs a model width divisible by 256, this is 1000"),
        ("2.11.0a0+git", (2, 31, 0), 1024, None),
    ],
)
def test_the_elastic_buffer_judges_versions_and_width(
    torch_version, nccl, width, reason, install, monkeypatch
):
    backend = install("Buffer", "ElasticBuffer")
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: nccl)
    assert backend.why_deepep_unavailable(8, 64, width) == reason


@pytest.mark.parametrize(
    ("ranks", "width", "reason"),
    [
        (2, 1000, None),
        (160, 1024, None),
        (3, 1024, "is built for groups of 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160 ranks, not of 3"),
        (8, 1020, "needs a model width divisible by 8, this is 1020"),
    ],
)
def test_the_older_buffer_judges_ranks_and_width(ranks, width, reason, install):
    found = install("Buffer").why_deepep_unavailable(ranks, 64 * ranks, width)
    assert found is None if reason is None else found.startswith(reason)


def test_the_routing_map_judges_its_class_and_width(install):
    assert install("HybridEPBuffer").why_hybridep_unavailable(8, 64, 1024) is None
    assert install("HybridEPBuffer").why_hybridep_unavailable(8, 64, 1000).startswith("needs a model width")
    assert "HybridEPBuffer" in install("Buffer", "ElasticBuffer").why_hybridep_unavailable(8, 64, 1024)


def test_beyond_one_node_the_older_buffer_waits_for_the_counts(install):
    """It refuses num_worst_tokens there; within a node it gets the most rows that can come."""
    backend = install("Buffer")
    for ranks, expected, rdma in ((8, 7, 0), (16, 0, 1024 * 2 * 16)):
        group = types.SimpleNamespace(size=lambda ranks=ranks: ranks, rank=lambda: 0)
        passed = {}

        class Buffer(deepep_emulation.Buffer):
            def __init__(self, *, num_rdma_bytes, passed=passed, **kwargs):
                super().__init__(**kwargs)
                passed["rdma"] = num_rdma_bytes

            def dispatch(self, passed=passed, **kwargs):
                passed["worst"] = kwargs["num_worst_tokens"]
                return (None,) * 6

        backend.deep_ep.Buffer = Buffer
        library = backend._Legacy(group, 64, 1024, 32)
        topk = torch.zeros(4, 32, dtype=torch.int64)
        library.dispatch(torch.zeros(4, 1024), topk, topk.float(), 7)
        assert passed == {"worst": expected, "rdma": rdma}
