"""A scorer class from outside the package: ``FILE.py:CLASS`` or ``PACKAGE.MODULE:CLASS``."""

from __future__ import annotations

import hashlib
import inspect
import sys

from megatron_nucleus.data.curation import own_code
from megatron_nucleus.utils.errors import ConfigError, nearest

_MEMBERS = ("name", "revision", "side_px", "score")


def load_class(kind: str) -> type:
    """The class that ``kind`` names.

    Raises:
        ConfigError: no such file, module or class, or it fails to import.
    """
    label = f"kind {kind}"
    found = own_code.load(kind, label)
    if not inspect.isclass(found):
        place, name = kind.rsplit(":", 1)
        members = vars(own_code.module_of(kind, label))
        classes = [key for key, value in members.items() if inspect.isclass(value)]
        raise ConfigError(f"{label}: {place} has no class {name}{nearest(name, classes)}")
    return found


def check_members(kind: str, scorer: object) -> None:
    """Raises ConfigError when an object is no `Scorer`, naming what it lacks."""
    missing = [name for name in _MEMBERS if not hasattr(scorer, name)]
    if missing:
        raise ConfigError(f"kind {kind}: it has no {missing[0]}; a scorer has {', '.join(_MEMBERS)}")


def source_checksum(found: type) -> str:
    """16 hex digits of the source of the class's module."""
    return hashlib.sha256(inspect.getsource(sys.modules[found.__module__]).encode()).hexdigest()[:16]
