"""A recipe: which stages run, in which order, with which settings.

    recipe:
      stages:
      - inspect
      - exact_duplicates
      - {score: {as: aesthetic, kind: aesthetic, model: path/to/siglip2, head: aesthetic.safetensors}}
      - {my_stages.py:portraits: {max_height_over_width: 1.5}}

A line is a built-in stage's name, or ``FILE.py:FUNCTION`` or ``PACKAGE.MODULE:FUNCTION`` for one of your own, alone or
with settings. ``as`` gives a stage another name, so that it can be used twice. A built-in stage takes its settings
from the section of its name (which has flags) and from the line; a setting that both give is refused.

The whole chain is checked before anything runs: every column that a stage reads is written by one before it, every
score that it names as well, and what it relies on is there (heads, models, own classes, keys).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from megatron_nucleus.data import index
from megatron_nucleus.data.curation import own_code, readers
from megatron_nucleus.data.curation.stage import Stage
from megatron_nucleus.data.curation.store import Level
from megatron_nucleus.utils.config import coerce, knob, to_dict
from megatron_nucleus.utils.errors import ConfigError, DataError, nearest

_STAGES = "megatron_nucleus.data.curation.stages"
BUILT_IN = {
    name: f"{_STAGES}.{name}:{name}"
    for name in (
        "inspect",
        "exact_duplicates",
        "blank",
        "blur",
        "near_duplicates",
        "score",
        "recaption",
        "tiers",
    )
}
# Level 0 of the store: the items as the readers find them, and the columns that stages append to, still empty.
START_SCHEMA = pa.schema(
    [
        *readers.LISTED_SCHEMA,
        pa.field("scores", pa.list_(index.SCORE_TYPE)),
        pa.field("duplicates", pa.list_(index.DUPLICATE_TYPE)),
        pa.field("duplicate_cluster", pa.string()),
    ]
)
NEEDED_BY_PACKING = (
    *("id", "extension", "width_px", "height_px", "exif_orientation", "source_url", "licence", "attribution"),
    *("captions", "tier", "episode_bucket", "metadata"),
)
_PACKED_TYPES = {field.name: field.type for field in index.INDEX_SCHEMA if field.name in NEEDED_BY_PACKING}
_RESERVED = ("position", "item", "container", "offset", "sidecars", "problem", "given")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,60}")


class Line(NamedTuple):
    """One line of a recipe, resolved; picklable.

    name: of the stage in this recipe. spec: ``module:function`` or ``/abs/file.py:function``. settings: plain values.
    """

    name: str
    spec: str
    settings: dict[str, Any]

    def load(self) -> tuple[Stage, Any]:
        """The stage and its settings."""
        stage = load_stage(self.spec)
        return stage, build_settings(stage, self.settings, f"recipe.stages: {self.name}")


class Raw(NamedTuple):
    """A line as written. spec: what names the stage. name: what ``as`` says, or None."""

    spec: str
    name: str | None
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StageList:
    """The value of ``recipe.stages``."""

    lines: tuple[Raw, ...]

    @classmethod
    def from_plain(cls, raw: Any, label: str) -> StageList:
        """Check the form of a YAML list; see the module docstring.

        Raises:
            ConfigError: beginning with ``label``.
        """
        if not isinstance(raw, (list, tuple)) or not raw:
            raise ConfigError(f"{label}: expected a list of stages, got {raw!r:.100}")
        return cls(tuple(_raw_line(entry, f"{label}[{number}]") for number, entry in enumerate(raw)))

    def to_plain(self) -> list[Any]:
        """Inverse of `from_plain`."""
        out: list[Any] = []
        for line in self.lines:
            settings = ({"as": line.name} if line.name else {}) | line.settings
            out.append({line.spec: settings} if settings else line.spec)
        return out

    def __str__(self) -> str:
        """As ``--help`` shows it."""
        return yaml.safe_dump(self.to_plain(), default_flow_style=True, width=1000, sort_keys=False).strip()


def _raw_line(entry: Any, label: str) -> Raw:
    if isinstance(entry, str):
        return Raw(entry, None, {})
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"{label}: expected NAME or {{NAME: {{KEY: VALUE}}}}, got {entry!r:.100}")
    ((spec, settings),) = entry.items()
    if not isinstance(spec, str) or not isinstance(settings, Mapping | None):
        raise ConfigError(f"{label}: expected {{NAME: {{KEY: VALUE}}}}, got {entry!r:.100}")
    settings = dict(settings or {})
    name = settings.pop("as", None)
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(f"{label}: as: {name!r} is not a plain name (letters, digits, _)")
    return Raw(spec, name, settings)


DEFAULT_STAGES = StageList.from_plain(
    [
        "inspect",
        "exact_duplicates",
        "blank",
        "blur",
        "near_duplicates",
        {"score": {"as": "image_statistics", "kind": "image_statistics"}},
        {"tiers": {"tier_by": "shares", "tier_scorer": "image_statistics"}},
    ],
    "the default recipe",
)


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Which stages run, in this order."""

    stages: StageList = knob(
        DEFAULT_STAGES, "list of stages: NAME, FILE.py:FUNCTION, or {NAME: {as: OTHER_NAME, KEY: VALUE}}"
    )


def resolve(config: RecipeConfig, sections: Mapping[str, Any]) -> tuple[Line, ...]:
    """The lines of a recipe with their settings, checked.

    Args:
        sections: settings of built-in stages, by the name of the stage.

    Raises:
        ConfigError: an unknown stage or setting, two of one name, or a column that no stage before writes; names
            the line.
    """
    lines: list[Line] = []
    for raw in config.stages.lines:
        label = f"recipe.stages: {raw.spec}"
        spec = _find(raw.spec, label)
        stage = load_stage(spec)
        base = _section_values(sections.get(raw.spec), raw, label)
        if raw.name and "metric" in {field.name for field in dataclasses.fields(stage.settings)}:
            base["metric"] = raw.name  # a score carries the name of its line
        settings = build_settings(stage, base | raw.settings, label)
        name = raw.name or stage.name
        if name in [line.name for line in lines]:
            raise ConfigError(f"{label}: a second stage named {name}; give one another name with 'as'")
        lines.append(Line(name, spec, to_dict(settings)))
    _check_columns(lines)
    _check_scores(lines)
    return tuple(lines)


def versions(lines: Sequence[Line]) -> dict[str, str]:
    """Version of every stage, by the line's name.

    Reads what the stages rely on, and lets each check what else its rows will need: so a mistake in the last line is
    found before the first one runs.

    Raises:
        ConfigError, DataError: what a stage's ``identity`` or ``check`` raises, naming the line.
    """
    out = {}
    for line in lines:
        label = f"recipe.stages: {line.name}"
        try:
            stage, settings = line.load()
            stage.check(settings)
            out[line.name] = stage.version(settings)
        except DataError as error:
            raise DataError(f"{label}: {error}") from error
        except (ConfigError, OSError) as error:
            text = str(error)
            raise ConfigError(text if text.startswith(label) else f"{label}: {text}") from error
    return out


def _section_values(section: Any, raw: Raw, label: str) -> dict[str, Any]:
    """The settings of a stage's section as plain values."""
    if section is None:
        return {}
    values, defaults = to_dict(section), to_dict(type(section)())
    both = [key for key in raw.settings if key in values and values[key] != defaults[key]]
    if both:
        flag = "--" + both[0].replace("_", "-")
        raise ConfigError(
            f"{label}: {both[0]} is given in the recipe's line ({raw.settings[both[0]]!r}) and by {flag} or section "
            f"{raw.spec} ({values[both[0]]!r}); give it once"
        )
    return values


def levels(lines: Sequence[Line]) -> tuple[Level, ...]:
    """The stages as the store sees them; number 0 is the list of items."""
    rest = (Level(n, line.name, tuple(line.load()[0].adds.names)) for n, line in enumerate(lines, 1))
    return (Level(0, "list", tuple(START_SCHEMA.names)), *rest)


def _check_columns(lines: Sequence[Line]) -> None:
    known = {"position": pa.int32()} | {field.name: field.type for field in START_SCHEMA}
    for line in lines:
        stage, _ = line.load()
        if missing := [name for name in stage.reads if name not in known]:
            raise ConfigError(
                f"recipe.stages: {line.name} reads column {missing[0]}, which no stage before it writes"
                f"{_writer_hint(missing[0])}"
            )
        for field in stage.adds:
            _check_added(line.name, field, known)
        known |= {field.name: field.type for field in stage.adds}
    if missing := [name for name in NEEDED_BY_PACKING if name not in known]:
        raise ConfigError(
            f"recipe.stages: no stage writes column {missing[0]}, which the index needs{_writer_hint(missing[0])}"
        )


def _check_scores(lines: Sequence[Line]) -> None:
    """Whether a stage before writes the scores that others name; one that does not say which may write any."""
    written: list[str] = []
    for line in lines:
        stage, settings = line.load()
        for knob_name, score in stage.needs_scores(settings).items():
            if score not in written:
                raise ConfigError(
                    f"recipe.stages: {line.name}: {knob_name} {score}: no stage before it writes a score of that name"
                    f"{nearest(score, written)} (there is: {', '.join(written) or 'none'}); put a score stage with "
                    "that name (as) before it, or name another"
                )
        names = stage.writes_scores(settings)
        if names is None:
            return
        written += names


def _check_added(name: str, field: pa.Field, known: Mapping[str, pa.DataType]) -> None:
    if field.name in _RESERVED:
        raise ConfigError(
            f"recipe.stages: {name} writes column {field.name}, which is not a stage's to write"
        )
    wanted = known.get(field.name, _PACKED_TYPES.get(field.name))
    if wanted is not None and field.type != wanted:
        raise ConfigError(
            f"recipe.stages: {name} writes column {field.name} as {field.type}, it must be {wanted}"
        )


def _writer_hint(column: str) -> str:
    writers = [name for name, spec in BUILT_IN.items() if column in load_stage(spec).adds.names]
    return f"; {' or '.join(writers)} does" if writers else ""


def _find(spec: str, label: str) -> str:
    """The absolute form of a stage's name."""
    if ":" in spec:
        return own_code.absolute(spec, label)
    if spec not in BUILT_IN:
        raise ConfigError(
            f"{label}: unknown stage{nearest(spec, BUILT_IN)}; one of {', '.join(BUILT_IN)}, or FILE.py:FUNCTION"
        )
    return BUILT_IN[spec]


@functools.cache
def load_stage(spec: str) -> Stage:
    """The stage that ``module:function`` or ``/abs/file.py:function`` names.

    Raises:
        ConfigError: it cannot be imported, or is no stage.
    """
    label = f"recipe.stages: {spec}"
    stage = own_code.load(spec, label)
    if not isinstance(stage, Stage):
        place, function = spec.rsplit(":", 1)
        found = [
            name for name, value in vars(own_code.module_of(spec, label)).items() if isinstance(value, Stage)
        ]
        raise ConfigError(
            f"{label}: {function} is no stage (row_stage or corpus_stage makes one); {place} has "
            f"{', '.join(found) or 'none'}"
        )
    return stage


def build_settings(stage: Stage, values: Mapping[str, Any], label: str) -> Any:
    """The stage's settings from plain values.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range, beginning with ``label``.
    """
    hints = typing.get_type_hints(stage.settings)
    fields = {field.name: field for field in dataclasses.fields(stage.settings)}
    out = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{label}: unknown key '{key}'{nearest(str(key), fields)}")
        choices = fields[key].metadata.get("choices") or ()
        out[key] = coerce(value, hints[key], f"{label}.{key}", choices)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in out]:
        raise ConfigError(f"{label}: {missing[0]} is required")
    try:
        return stage.settings(**out)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
