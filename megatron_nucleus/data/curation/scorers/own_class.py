"""A scorer class from outside the package: ``FILE.py:CLASS`` or ``PACKAGE.MODULE:CLASS``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

from megatron_nucleus.utils.errors import ConfigError, nearest

_MEMBERS = ("name", "revision", "side_px", "score")


def load_class(kind: str) -> type:
    """The class that ``kind`` names. A file is imported once per process, under a name made from its path.

    Raises:
        ConfigError: no such file, module or class, or it fails to import; or the class lacks ``score``.
    """
    place, name = kind.rsplit(":", 1)
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(f"kind {kind}: {place}: no such file")
    try:
        module = (
            _import_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
        )
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(f"kind {kind}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"kind {kind}: {place} has no class {name}{nearest(name, classes)}")
    return found


def check_members(kind: str, scorer: object) -> None:
    """Raises ConfigError when an object is no `Scorer`, naming what it lacks."""
    missing = [name for name in _MEMBERS if not hasattr(scorer, name)]
    if missing:
        raise ConfigError(f"kind {kind}: it has no {missing[0]}; a scorer has {', '.join(_MEMBERS)}")


def source_checksum(found: type) -> str:
    """16 hex digits of the source of the class's module."""
    return hashlib.sha256(inspect.getsource(sys.modules[found.__module__]).encode()).hexdigest()[:16]


def _import_file(path: Path) -> ModuleType:
    name = "curation_scorer_" + re.sub(r"\W", "_", str(path))
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
