"""Frozen dataclasses -> argparse groups + YAML sections -> one checked configuration.

A program declares a frozen dataclass whose fields are *sections*, themselves frozen dataclasses that live
beside the code that reads them. Every field of a section is a *knob*: one YAML key inside the section and one
command-line flag (``train_steps`` -> ``--train-steps``). Precedence: default < ``--config`` file < flag.
Unknown keys and flags are errors that name the nearest known one.

A knob's type is a scalar, a tuple of scalars, one of these or None, or a *structured* type for what needs a table: a
class with ``from_plain(raw, label)``, which checks a YAML value and raises ConfigError beginning with ``label``, and
``to_plain()``, its inverse. Its flag takes YAML text.

A number is finite: NaN and infinity are refused wherever `coerce` reads one, so also inside a structured type, whose
``from_plain`` reads its numbers by `coerce`. A knob without a limit is ``float | None``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_nucleus.utils.config_files import Origins, read_yaml
from megatron_nucleus.utils.errors import ConfigError, nearest

T = TypeVar("T")
_UNSET = object()


def knob(default: Any = dataclasses.MISSING, help: str = "", *, unit: str = "", choices: tuple = ()) -> Any:
    """Declare one setting of a section.

    Args:
        default: value when neither file nor flag gives one; omit it to make the setting required.
        help: one line for ``--help``.
        unit: unit shown in ``--help`` (``px``, ``steps``, ``tokens``).
        choices: allowed values; empty means any value of the annotated type.
    """
    metadata = {"help": help, "unit": unit, "choices": tuple(choices)}
    if isinstance(default, (list, dict)):
        raise TypeError("use a tuple: configuration is immutable")
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (exit code 2) that name the nearest known flag."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            raise ConfigError(f"unknown argument {unknown[0]}{nearest(name, self._flags())}; see --help")
        return parsed

    def _flags(self) -> list[str]:
        """Every long flag, those of subcommands included."""
        flags = []
        for action in self._actions:
            flags += [option for option in action.option_strings if option.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    flags += parser._flags()
        return flags


def sections_of(cls: type) -> dict[str, type]:
    """Return ``{section name: dataclass}`` of a configuration dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])}


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add one argument group per section of ``cls`` and one flag per knob."""
    seen: dict[str, str] = {}
    for section, section_cls in sections_of(cls).items():
        doc = (section_cls.__doc__ or "").strip().splitlines()
        group = parser.add_argument_group(section, doc[0] if doc else None)
        hints = typing.get_type_hints(section_cls)
        for field in dataclasses.fields(section_cls):
            if field.name in seen:
                raise TypeError(f"knob {field.name} is declared in sections {seen[field.name]} and {section}")
            seen[field.name] = section
            _add_flag(group, section, field, hints[field.name])


def _add_flag(group, section: str, field: dataclasses.Field, hint: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = "required" if field.default is dataclasses.MISSING else f"default {_show(field.default)}"
    unit = field.metadata.get("unit")
    text = field.metadata.get("help", "") + f" [{unit + ', ' if unit else ''}{default}]"
    text = text.replace("%", "%%")
    dest = f"{section}.{field.name}"
    base, _ = _strip_optional(hint)
    if base is bool:
        group.add_argument(flag, dest=dest, default=_UNSET, action=argparse.BooleanOptionalAction, help=text)
        return
    nargs = "+" if typing.get_origin(base) is tuple else None
    choices = field.metadata.get("choices") or ()
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _metavar(base)
    group.add_argument(flag, dest=dest, default=_UNSET, nargs=nargs, metavar=metavar, help=text)


def load(cls: type[T], args: argparse.Namespace, config_file: str | Path | None) -> T:
    """Build ``cls`` from defaults, a YAML file and parsed flags (see the module docstring).

    Raises:
        ConfigError: unknown section or key, wrong type, value outside the choices, or a missing required knob.
    """
    return load_named(cls, args, config_file)[0]


def load_named(cls: type[T], args: argparse.Namespace, config_file: str | Path | None) -> tuple[T, Origins]:
    """`load`, and which file gave each value that no flag overrode: for the messages of later checks."""
    values, origins = read_yaml(config_file) if config_file else ({}, Origins())
    origins = _completed(origins, cls, vars(args))
    where = str(config_file or "defaults")
    return from_dict(cls, values, flags=vars(args), where=where, origins=origins), origins


def from_dict(
    cls: type[T],
    values: dict,
    flags: dict | None = None,
    where: str = "config",
    origins: Origins | None = None,
) -> T:
    """Build ``cls`` from a nested mapping, with optional ``{"section.knob": value}`` flags on top.

    where: what messages call the mapping. origins: the file of each value, where they come from several.
    """
    origins = _completed(Origins() if origins is None else origins, cls, flags or {})
    sections = sections_of(cls)
    for name, value in values.items():
        if name not in sections:
            file = next((f for key, f in origins.items() if key.startswith(f"{name}.")), where)
            raise ConfigError(f"{file}: unknown section '{name}'{nearest(name, sections)}")
        if not isinstance(value, dict) and value is not None:
            raise ConfigError(f"{where}: section '{name}' must be a mapping, got {value!r}")
    built = {
        name: _build_section(name, section_cls, values.get(name) or {}, flags or {}, where, origins)
        for name, section_cls in sections.items()
    }
    return cls(**built)


def _completed(origins: Origins, cls: type, flags: dict) -> Origins:
    """Without the keys that a flag overrode, and with all other keys of ``cls`` as `Origins.others`."""
    known = {
        f"{section}.{field.name}"
        for section, section_cls in sections_of(cls).items()
        for field in dataclasses.fields(section_cls)
    }
    files = {name: file for name, file in origins.items() if flags.get(name, _UNSET) is _UNSET}
    return Origins(files, known - files.keys())


def _build_section(section: str, cls: type, values: dict, flags: dict, where: str, origins: Origins) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            file = origins.get(f"{section}.{key}", where)
            raise ConfigError(f"{file}: unknown key '{section}.{key}'{nearest(str(key), fields)}")
    out = {}
    for name, field in fields.items():
        flag_value = flags.get(f"{section}.{name}", _UNSET)
        if flag_value is not _UNSET:
            label, raw = "--" + name.replace("_", "-"), flag_value
        elif name in values:
            label, raw = f"{origins.get(f'{section}.{name}', where)}: {section}.{name}", values[name]
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{where}: {section}.{name} (--{name.replace('_', '-')}) is required")
        else:
            continue
        out[name] = coerce(raw, hints[name], label, field.metadata.get("choices") or ())
    with origins.named():
        return cls(**out)


def coerce(raw: Any, hint: Any, label: str, choices: tuple = ()) -> Any:
    """Convert a YAML or command-line value to the annotated type.

    Args:
        label: what messages call the value: ``--some-key`` or ``file: section.some_key``.
        choices: the values that are allowed; empty means any.

    Raises:
        ConfigError: begins with ``label``; another type, a number that is not finite, or a value outside the choices.
    """
    base, optional = _strip_optional(hint)
    if optional and (raw is None or (isinstance(raw, str) and raw.lower() == "none")):
        return None
    if hasattr(base, "from_plain"):
        return base.from_plain(_parse_text(raw, label), label)
    value = (
        _coerce_tuple(raw, base, label)
        if typing.get_origin(base) is tuple
        else _coerce_scalar(raw, base, label)
    )
    if choices and value not in choices:
        guess = nearest(str(value), map(str, choices))
        raise ConfigError(f"{label}: {value!r} is not allowed{guess}; one of: {', '.join(map(str, choices))}")
    return value


def _parse_text(raw: Any, label: str) -> Any:
    """The value of a structured knob; on the command line it is YAML text."""
    if not isinstance(raw, str):
        return raw
    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"{label}: not valid YAML ({' '.join(str(error).split())})") from error


def _coerce_scalar(raw: Any, base: type, label: str) -> Any:
    expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(base, "text")
    problem = ConfigError(f"{label}: expected {expected}, got {raw!r}")
    if base is bool:
        if not isinstance(raw, bool):
            raise problem
        return raw
    if base in (str, Path):
        if raw is None or isinstance(raw, (dict, list, tuple, bool)):
            raise problem
        return base(raw)
    if isinstance(raw, (bool, list, tuple, dict)) or raw is None:
        raise problem
    try:
        value = float(raw)  # also reads YAML's 1e-4, which YAML 1.1 calls a string
    except (ValueError, OverflowError):
        raise problem from None
    if not math.isfinite(value):
        if base is int:
            raise problem
        raise ConfigError(f"{label}: expected a finite number, got {raw!r}")
    if base is int:
        if value != int(value):
            raise problem
        return int(str(raw)) if isinstance(raw, str) and raw.lstrip("+-").isdigit() else int(value)
    return value


def _coerce_tuple(raw: Any, base: Any, label: str) -> tuple:
    items = raw if isinstance(raw, (list, tuple)) else (raw,)
    kinds = typing.get_args(base)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_coerce_scalar(x, kinds[0], label) for x in items)
    if len(items) != len(kinds):
        raise ConfigError(f"{label}: expected {len(kinds)} values, got {len(items)}: {raw!r}")
    return tuple(_coerce_scalar(x, k, label) for x, k in zip(items, kinds, strict=True))


def to_dict(config: Any) -> dict:
    """Nested plain mapping of a configuration (tuples as lists, paths as text), ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if hasattr(value, "to_plain"):
            return value.to_plain()
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(rest) != 1:
            raise TypeError(f"a knob may be one type or None, not {hint}")
        return rest[0], True
    return hint, False


def _metavar(base: Any) -> str:
    if typing.get_origin(base) is tuple:
        base = typing.get_args(base)[0]
    if hasattr(base, "from_plain"):
        return "YAML"
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}.get(base, "VALUE")


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)
