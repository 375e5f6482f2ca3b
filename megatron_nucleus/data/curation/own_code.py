"""Code from outside the package: ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``, for stages, scorers and captioners."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_nucleus.utils.errors import ConfigError


def absolute(spec: str, label: str) -> str:
    """The same name with the file's absolute path, so that it holds in every process.

    Raises:
        ConfigError: no such file; begins with ``label``.
    """
    place, name = spec.rsplit(":", 1)
    if not place.endswith(".py"):
        return spec
    path = Path(place).resolve()
    if not path.is_file():
        raise ConfigError(f"{label}: {place}: no such file")
    return f"{path}:{name}"


def module_of(spec: str, label: str) -> ModuleType:
    """The module that a name points into; a file is imported once per process, under a name made from its path.

    Raises:
        ConfigError: no such file or module, or it fails to import; begins with ``label``.
    """
    place = absolute(spec, label).rsplit(":", 1)[0]
    try:
        return _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(f"{label}: {type(error).__name__}: {error}") from error


def load(spec: str, label: str) -> Any:
    """The object that a name points to, or None where the module has none of that name; raises as `module_of`."""
    return getattr(module_of(spec, label), spec.rsplit(":", 1)[1], None)


def _import_file(path: Path) -> ModuleType:
    name = "own_code_" + re.sub(r"\W", "_", str(path))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
