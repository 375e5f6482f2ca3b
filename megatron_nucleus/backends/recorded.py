"""The calls that the adapters beside this file make of optional libraries, as they were when they were written.

None of these libraries is a dependency and none is installed where this project is tested, so nothing would notice
that one has changed. `recorded_calls.py` holds what was read in its source: tests build stand-ins with exactly these
signatures and run the adapters against them, an adapter refuses a library that no longer takes its calls (`drift`),
and tools/doctor.py compares what is installed with the record (`changes`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from types import ModuleType
from typing import Any

from megatron_nucleus.backends.recorded_calls import LIBRARIES, Call, Library
from megatron_nucleus.ops.registry import missing


def library(name: str) -> Library:
    """The record of `Library.name`."""
    return next(entry for entry in LIBRARIES if entry.name == name)


def signature_of(function: Any) -> str:
    """A signature in the words of `Call`; a compiled function's from the first line of its docstring.

    Raises:
        ValueError: a compiled function that does not say what it takes.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        listed = re.match(r"\w+\((.*?)\) ->", function.__doc__ or "", re.DOTALL)  # as pybind11 writes it
        if listed is None:
            raise ValueError(f"{function} does not say what it takes") from None
        return " ".join("/" for _ in re.findall(r"\barg\d+:", listed[1]))
    words = []
    for parameter in parameters:
        star = "*" if parameter.kind is parameter.KEYWORD_ONLY else ""
        words.append(f"{star}{parameter.name}{'' if parameter.default is parameter.empty else '='}")
    return " ".join(words)


def find(module: Any, name: str) -> Any | None:
    """What ``name`` (dotted) is in ``module``, or None."""
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            return None  # and not None's own attributes: it has an __init__, too
        found = getattr(found, part)
    return found


def drift(module: ModuleType, calls: tuple[Call, ...]) -> str | None:
    """Why ``module`` no longer takes one of ``calls``, in one line; None when it takes them all.

    Keywords that were added with a default or that changed places do no harm. A compiled function that does not say
    what it takes is let through.
    """
    for call in calls:
        function, full = find(module, call.name), f"{module.__name__}.{call.name}"
        if function is None:
            return f"needs {full}, which this version does not have"
        try:
            words = signature_of(function).split()
        except ValueError:
            continue
        if call.used.isdigit():
            if len(words) != int(call.used):
                return f"calls {full} with {call.used} values, this version takes {len(words)}"
            continue
        used, names = call.used.split(), {word.strip("*=") for word in words}
        gone = [name for name in used if name not in names]
        if gone and not _takes_any_keyword(function):
            return f"needs {full} with {', '.join(gone)}, which this version does not take"
        required = {w.strip("*") for w in words if not w.endswith("=")} - {"self", "args", "kwargs"}
        if required - set(used):
            new = ", ".join(sorted(required - set(used)))
            return f"calls {full} without {new}, which this version requires"
    return None


def changes(module: ModuleType, calls: tuple[Call, ...]) -> list[str]:
    """One line for each call whose signature is not the recorded one, harmful or not: ``name: + new - gone``."""
    found = []
    for call in calls:
        function = find(module, call.name)
        try:
            now = None if function is None else signature_of(function).split()
        except ValueError:
            now = ["(unreadable)"]
        then = call.signature.split()
        if now is None:
            found.append(f"{call.name}: gone")
        elif now != then:
            parts = [f"+ {w}" for w in now if w not in then] + [f"- {w}" for w in then if w not in now]
            found.append(f"{call.name}: {' '.join(parts) or 'other order'}")
    return found


def states() -> list[dict]:
    """Every recorded library beside what is installed, for tools/doctor.py. Imports what it finds.

    Returns:
        rows of {library, module, version, read, reason, changes}: reason says why it cannot be used (None = its
        calls fit), changes as in `changes`.
    """
    rows = []
    for entry in LIBRARIES:
        row = {"library": entry.name, "module": entry.module, "version": _version(entry.package)}
        row |= {"read": entry.read, "reason": None, "changes": []}
        try:
            module = importlib.import_module(entry.module)
        except Exception as error:  # such libraries raise RuntimeError, AssertionError and OSError at import
            row["reason"] = missing(error)
        else:
            row |= {"reason": drift(module, entry.calls), "changes": changes(module, entry.calls)}
        rows.append(row)
    return rows


def _version(package: str | None) -> str | None:
    try:
        return None if package is None else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _takes_any_keyword(function: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
