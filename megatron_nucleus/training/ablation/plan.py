"""From a file of suites to runs of known length: what is compared, and how many steps each arm may take.

suites:
  small:
    base: ../demo_cpu.yaml       # configuration of tools/train.py, relative to this file
    set: {SECTION: {KEY: VALUE}} # on top of it, for every arm
    corpus: {count: 40000, seed: 0, scenes: {KEY: VALUE}, curation: {SECTION: {KEY: VALUE}}}
    text_tokens: 27              # mean padded caption of a batch: the text's share of the FLOPs
    budget_samples: 256000       # of the baseline, or budget_flops
    seeds: [0, 1, 2]
    min_seeds: 3                 # the default; a trial of the bench itself may do with 2
    evaluate: {prompts: {KEY: VALUE}, generation: {KEY: VALUE}}   # of tools/evaluate.py scenes
    baseline: baseline           # the arm that every other one is compared with
    arms:
      baseline: {}
      coupled: {set: {model: {decoupled_routing: false}}}
      ladder: {stages: [{share: 1, set: {...}}, {share: 1, set: {...}}]}   # chained runs; shares of the budget
      wsm_8: {from: baseline, merge: {last: 8, weights: inverse_sqrt}}     # no training of its own
    comparisons: [{name: decoupled routing, claim: TEXT, baseline: coupled, arm: baseline}]

Every arm gets the steps that the budget pays for, in model FLOPs (`training/flops.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.data import buckets
from megatron_nucleus.data.curation import settings as curation_settings
from megatron_nucleus.data.encoders import EncoderConfig, build_codec, build_text_encoder
from megatron_nucleus.data.scenes import SceneConfig
from megatron_nucleus.evaluation.scenes_run import SceneEvaluation
from megatron_nucleus.export.merge_weights import merge_weights
from megatron_nucleus.training import flops
from megatron_nucleus.training.ablation.suites import (
    Arm,
    Comparison,
    Corpus,
    Merge,
    Part,
    Sections,
    Suite,
)
from megatron_nucleus.training.arguments import RunConfig, check
from megatron_nucleus.training.initialize import run_shape
from megatron_nucleus.training.stage_checks import check_buckets
from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config_files import read_yaml
from megatron_nucleus.utils.errors import ConfigError, nearest

# The bench gives these itself: (section, key).
OWN_KEYS = (
    ("training", "run_dir"),
    ("training", "seed"),
    ("training", "train_steps"),
    ("training", "init_from"),
    ("training", "init_optimizer"),
    ("data", "data_path"),
)
MIN_SEEDS = 3  # of a suite that does not say; with two, twice the standard error is hardly a bar


@dataclasses.dataclass(frozen=True)
class _Images:
    """What the images of a suite's corpus are. buckets: aspect buckets. text_tokens: mean padded caption."""

    buckets: tuple[str, ...]
    text_tokens: int


def read_suites(path: str | Path) -> dict[str, Suite]:
    """All suites of a file, checked to the last arm.

    Raises:
        ConfigError: unknown or missing keys, a setting that tools/train.py would refuse, a budget that pays for no
            step, a derived arm whose source keeps too few checkpoints, an arm whose images are no whole tokens or
            fewer tokens than experts, fewer seeds than the suite's ``min_seeds``.
    """
    path = Path(path)
    document = _keys(read_yaml(path).values, str(path), required=("suites",))
    suites = document["suites"]
    if not suites:
        raise ConfigError(f"{path}: suites: there is none")
    return {name: _suite(path, name, _mapping(raw, f"{path}: suites.{name}")) for name, raw in suites.items()}


def _suite(path: Path, name: str, raw: dict) -> Suite:
    where = f"{path}: suites.{name}"
    required = ("base", "corpus", "text_tokens", "seeds", "arms")
    optional = ("set", "budget_samples", "budget_flops", "evaluate", "baseline", "comparisons", "min_seeds")
    raw = _keys(raw, where, required, optional)
    min_seeds = _min_seeds(raw.get("min_seeds", MIN_SEEDS), f"{where}: min_seeds")
    seeds = check_seeds(raw["seeds"], f"{where}: seeds", min_seeds)
    baseline = str(raw.get("baseline", "baseline"))
    arms = {
        str(n): _mapping(v, f"{where}: arms.{n}") for n, v in _mapping(raw["arms"], f"{where}: arms").items()
    }
    if baseline not in arms:
        raise ConfigError(f"{where}: baseline: there is no arm '{baseline}'{nearest(baseline, arms)}")
    common = layered([_without_own(read_yaml(path.parent / str(raw["base"])).values), _changes(raw, where)])
    corpus, names = _corpus(raw["corpus"], f"{where}: corpus")
    images = _Images(names, _whole(raw["text_tokens"], f"{where}: text_tokens"))
    budget = _budget(raw, common, arms[baseline], images, where, baseline)
    trained = {
        n: _trained_arm(n, arm, common, budget, images, f"{where}: arms.{n}")
        for n, arm in arms.items()
        if "from" not in arm
    }
    built = {
        n: trained[n] if n in trained else _derived_arm(n, arm, trained, f"{where}: arms.{n}")
        for n, arm in arms.items()
    }
    return Suite(
        name, corpus, _evaluate(raw, where), images.text_tokens, budget, seeds, min_seeds,
        baseline, built, _comparisons(raw, built, where),
    )  # fmt: skip


def check_seeds(raw: object, label: str, min_seeds: int) -> tuple[int, ...]:
    """At least ``min_seeds`` different seeds (ConfigError): few runs have a poor error bar, one has none."""
    seeds = cfg.coerce(raw, tuple[int, ...], label)
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"{label} {' '.join(map(str, seeds))}: each once")
    if len(seeds) < min_seeds:
        trial = "; for a trial write min_seeds: 2 in the suite" if min_seeds > 2 else ""
        raise ConfigError(
            f"{label} {' '.join(map(str, seeds))}: error bars need at least {min_seeds} seeds{trial}"
        )
    return seeds


def _min_seeds(raw: object, label: str) -> int:
    count = cfg.coerce(raw, int, label)
    if count < 2:
        raise ConfigError(f"{label} {count}: must be at least 2, one run has no error bar")
    return count


def layered(layers: Iterable[Mapping[str, dict | None]]) -> Sections:
    """Sections merged key by key, the later layer wins."""
    out: Sections = {}
    for layer in layers:
        for section, keys in layer.items():
            out.setdefault(section, {}).update(keys or {})
    return out


def steps_for(budget_flops: float, flops_per_image: int, global_batch_size: int) -> int:
    """Whole optimizer steps that a budget of training FLOPs pays for."""
    return int(budget_flops // (flops_per_image * global_batch_size))


def _flops_per_image(run: RunConfig, images: _Images, where: str) -> int:
    """Training FLOPs of one image of the square bucket.

    Raises:
        ConfigError: begins with ``where``; images that are no whole tokens, or with fewer tokens than experts or rows
            per expert.
    """
    with _named(where):
        shape, stride_px = _shape(run), _stride_px(run.encoders)
        check_buckets(run, shape, images.buckets, stride_px * shape.patch_size)
        side = run.data.resolution_px // (stride_px * shape.patch_size)
        try:
            return flops.training_flops_per_image(shape, side * side, images.text_tokens)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _budget(raw: dict, common: Sections, baseline: dict, images: _Images, where: str, name: str) -> int:
    if ("budget_samples" in raw) == ("budget_flops" in raw):
        raise ConfigError(f"{where}: give exactly one of budget_samples and budget_flops")
    if "budget_flops" in raw:
        return int(_positive(raw["budget_flops"], f"{where}: budget_flops"))
    if "stages" in baseline or "from" in baseline:
        raise ConfigError(f"{where}: budget_samples needs a baseline of one run; give budget_flops")
    samples = _whole(raw["budget_samples"], f"{where}: budget_samples")
    label = f"{where}: arms.{name}"
    run = _resolve(layered([common, _changes(baseline, label)]), label)
    return samples * _flops_per_image(run, images, label)


def _trained_arm(name: str, raw: dict, common: Sections, budget: int, images: _Images, where: str) -> Arm:
    raw = _keys(raw, where, optional=("set", "stages"))
    stages = raw.get("stages") or [{}]
    if not isinstance(stages, list):
        raise ConfigError(f"{where}: stages: expected a list of {{share, set}}, got {stages!r}")
    stages = [
        _keys(_mapping(s, f"{where}: stages"), f"{where}: stages", optional=("share", "set")) for s in stages
    ]
    shares = [_positive(stage.get("share", 1), f"{where}: stages: share") for stage in stages]
    parts = []
    for number, (stage, share) in enumerate(zip(stages, shares, strict=True)):
        label = f"{where}: stages[{number}]" if "stages" in raw else where
        values = layered([common, _changes(raw, where), _changes(stage, label)])
        parts.append(_part(values, budget * share / sum(shares), images, label))
    return Arm(name, {k: raw[k] for k in raw}, tuple(parts))


def _part(values: Sections, budget: float, images: _Images, where: str) -> Part:
    run = _resolve(values, where)
    if not run.validation.valid_samples:
        raise ConfigError(
            f"{where}: validation.valid_samples is 0: the bench compares losses of held-out images"
        )
    per_image = _flops_per_image(run, images, where)
    batch = run.training.global_batch_size
    steps = steps_for(budget, per_image, batch)
    if steps < 1:
        raise ConfigError(
            f"{where}: {budget:.3g} FLOPs pay for no step ({per_image * batch:.3g} each); raise the budget"
        )
    return Part(values, _shape(run), steps, steps * batch, per_image, kept_checkpoints(run, steps))


def kept_checkpoints(run: RunConfig, steps: int) -> int:
    """Checkpoints with weights that a run of ``steps`` steps leaves behind."""
    t = run.training
    saves = -(-steps // t.save_interval) if t.save_interval else 1
    if t.keep_last_checkpoints is None:
        return saves
    return min(saves, t.keep_last_checkpoints + (t.keep_last_weights or 0))


def _derived_arm(name: str, raw: dict, trained: dict[str, Arm], where: str) -> Arm:
    raw = _keys(raw, where, required=("from", "merge"))
    source = str(raw["from"])
    if source not in trained:
        raise ConfigError(f"{where}: from: there is no trained arm '{source}'{nearest(source, trained)}")
    merge = _keys(
        _mapping(raw["merge"], f"{where}: merge"), f"{where}: merge", ("last", "weights"), ("ema_decay",)
    )
    last = _whole(merge["last"], f"{where}: merge.last")
    decay = cfg.coerce(merge.get("ema_decay"), float | None, f"{where}: merge.ema_decay")
    with _named(f"{where}: merge"):
        merge_weights(str(merge["weights"]), range(last), ema_decay=decay)
    part = trained[source].parts[-1]
    if last > part.kept_checkpoints:
        raise ConfigError(
            f"{where}: merges {last} checkpoints, but '{source}' leaves {part.kept_checkpoints} after its "
            f"{part.steps} steps; change training.save_interval or training.keep_last_checkpoints there"
        )
    return Arm(name, raw, source=source, merge=Merge(last, str(merge["weights"]), decay))


def _resolve(values: Sections, where: str) -> RunConfig:
    """The configuration as tools/train.py would read it, with placeholders for what the bench gives."""
    given = layered([values, {"data": {"data_path": "given by the bench"}}])
    with _named(where):
        run = cfg.from_dict(RunConfig, given, where=where)
        check(run)
    return run


def _shape(run: RunConfig) -> ModelShape:
    return run_shape(run, _text_dim(run.encoders))


@functools.cache
def _text_dim(encoders: EncoderConfig) -> int:
    return build_text_encoder(encoders.text_spec()).dim


@functools.cache
def _stride_px(encoders: EncoderConfig) -> int:
    return build_codec(encoders.codec_spec()).stride_px


def _corpus(raw: object, where: str) -> tuple[Corpus, tuple[str, ...]]:
    """A corpus, and the aspect buckets that its scenes fall into."""
    raw = _keys(_mapping(raw, where), where, required=("count",), optional=("seed", "scenes", "curation"))
    sections = {name: _mapping(raw.get(name), f"{where}: {name}") for name in ("scenes", "curation")}
    with _named(where):
        scenes = cfg.from_dict(_CorpusSections, {"scenes": sections["scenes"]}, where=where).scenes
    with _named(f"{where}: curation"):
        cfg.from_dict(curation_settings.Settings, sections["curation"], where=f"{where}: curation")
    seed = cfg.coerce(raw.get("seed", 0), int, f"{where}: seed")
    names = dict.fromkeys(buckets.assign(*size_px) for size_px in scenes.sizes_px)
    return Corpus(_whole(raw["count"], f"{where}: count"), seed, **sections), tuple(names)


@dataclasses.dataclass(frozen=True)
class _CorpusSections:
    scenes: SceneConfig


def _evaluate(raw: dict, where: str) -> Sections:
    sections = _mapping(raw.get("evaluate"), f"{where}: evaluate")
    with _named(f"{where}: evaluate"):
        cfg.from_dict(SceneEvaluation, sections, where=f"{where}: evaluate")
    return sections


def _comparisons(raw: dict, arms: Mapping[str, Arm], where: str) -> tuple[Comparison, ...]:
    out = []
    for number, entry in enumerate(raw.get("comparisons") or []):
        label = f"{where}: comparisons[{number}]"
        entry = _keys(_mapping(entry, label), label, required=("name", "claim", "baseline", "arm"))
        for key in ("baseline", "arm"):
            if entry[key] not in arms:
                raise ConfigError(f"{label}: {key}: no arm '{entry[key]}'{nearest(str(entry[key]), arms)}")
        out.append(Comparison(**{key: str(value) for key, value in entry.items()}))
    return tuple(out)


def _changes(raw: Mapping, where: str) -> Sections:
    """The ``set`` of a suite, an arm or a stage."""
    changes = _mapping(raw.get("set"), f"{where}: set")
    for section, keys in changes.items():
        for key in _mapping(keys, f"{where}: set.{section}"):
            if (section, key) in OWN_KEYS:
                raise ConfigError(f"{where}: set.{section}.{key}: the bench gives this itself; leave it out")
    return changes


def _without_own(values: Sections) -> Sections:
    """A base configuration without what the bench gives itself."""
    return {
        section: {key: value for key, value in keys.items() if (section, key) not in OWN_KEYS}
        for section, keys in values.items()
    }


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Begin the message of a ConfigError with suite and arm, unless it does so already."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith(where):
            raise
        raise ConfigError(f"{where}: {error}") from error


def _mapping(raw: object, where: str) -> dict:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a mapping, got {raw!r}")
    return raw


def _keys(raw: dict, where: str, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> dict:
    for key in raw:
        if key not in (*required, *optional):
            raise ConfigError(f"{where}: unknown key '{key}'{nearest(str(key), (*required, *optional))}")
    for key in required:
        if key not in raw:
            raise ConfigError(f"{where}: {key} is missing")
    return raw


def _whole(raw: object, label: str) -> int:
    value = cfg.coerce(raw, int, label)
    if value < 1:
        raise ConfigError(f"{label} {value}: must be at least 1")
    return value


def _positive(raw: object, label: str) -> float:
    value = cfg.coerce(raw, float, label)
    if value <= 0:
        raise ConfigError(f"{label} {value}: must be above 0")
    return value
