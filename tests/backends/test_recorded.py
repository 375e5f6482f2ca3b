"""The record of optional libraries' calls: what it notices, and that what is installed here still fits."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from megatron_nucleus.backends import recorded
from tests.backends import stand_ins


@pytest.mark.parametrize("entry", recorded.LIBRARIES, ids=lambda e: e.name.replace(" ", "_"))
def test_what_is_used_is_in_the_record(entry):
    for call in entry.calls:
        names = [word.strip("*=") for word in call.signature.split()]
        if call.used.isdigit():
            assert len(names) == int(call.used)
            continue
        required = {w.strip("*") for w in call.signature.split() if not w.endswith("=")} - {"self"}
        assert required <= set(call.used.split()) <= set(names)


@pytest.mark.parametrize("entry", recorded.LIBRARIES, ids=lambda e: e.name.replace(" ", "_"))
def test_an_installed_library_still_takes_the_calls(entry):
    try:
        module = importlib.import_module(entry.module)
    except Exception as error:
        pytest.skip(f"{entry.module}: {error}")
    assert recorded.drift(module, entry.calls) is None


def test_a_stand_in_has_the_recorded_signatures():
    for entry in recorded.LIBRARIES:
        module = ModuleType(entry.module)
        for call in entry.calls:
            function = stand_ins.function_of(call, dict)
            if not call.used.isdigit():
                assert recorded.signature_of(function) == call.signature
            owner, _, last = call.name.rpartition(".")
            holder = module
            if owner:
                if not hasattr(module, owner):
                    setattr(module, owner, type(owner, (), {}))
                holder = getattr(module, owner)
            setattr(holder, last, function)
        assert recorded.drift(module, entry.calls) is None


def test_a_missing_class_is_not_taken_for_one_that_takes_anything():
    """None has an __init__ of its own."""
    calls = (recorded.Call("Gone.__init__", "self a", "a"),)
    module = ModuleType("library")
    assert recorded.drift(module, calls) == "needs library.Gone.__init__, which this version does not have"
    assert recorded.changes(module, calls) == ["Gone.__init__: gone"]


def test_changes_names_what_came_and_what_went():
    calls = (
        recorded.Call("f", "a b= *c=", "a"),
        recorded.Call("g", "a", "a"),
        recorded.Call("h", "a b", "a b"),
    )
    module = ModuleType("library")
    module.f = lambda a, b=1, *, d=2: None
    module.h = lambda b, a: None
    assert recorded.changes(module, calls) == ["f: + *d= - *c=", "g: gone", "h: other order"]


class _Compiled:
    """As pybind11 makes them: callable, without a signature that Python can read."""

    def __init__(self, text: str | None):
        self.__doc__ = text

    @property
    def __signature__(self):
        raise ValueError("no signature found")

    def __call__(self):
        """Never called: only its signature is looked at."""


def test_a_compiled_function_is_counted_by_its_docstring():
    text = "f(arg0: int, arg1: torch.Tensor, arg2: collections.abc.Sequence[int]) -> None\n\nWhat it does"
    module = ModuleType("library")
    module.f, module.silent = _Compiled(text), _Compiled(None)
    assert (
        recorded.drift(module, (recorded.Call("f", "/ / /", "3"), recorded.Call("silent", "/", "1"))) is None
    )
    expected = "calls library.f with 4 values, this version takes 3"
    assert recorded.drift(module, (recorded.Call("f", "/ / / /", "4"),)) == expected


def test_a_function_that_takes_any_keyword_fits():
    module = ModuleType("library")
    module.f = lambda *args, **kwargs: None
    assert recorded.drift(module, (recorded.Call("f", "a b=", "a b"),)) is None
