"""training/ablation/plan.py: equal FLOPs, hashes, and what is refused before anything runs."""

from __future__ import annotations

import copy

import pytest

from megatron_nucleus.core.models.presets import ModelConfig, resolve_shape
from megatron_nucleus.training import flops
from megatron_nucleus.training.ablation.plan import read_suites
from megatron_nucleus.utils.errors import ConfigError
from tests.support import ROOT

TEXT_TOKENS = 20


@pytest.fixture
def read(write):
    """Write a document and read it as suites."""
    return lambda values: read_suites(write(values))


def expected(**changes) -> int:
    """FLOPs of an image of 16 tokens, from the architecture."""
    shape = resolve_shape(ModelConfig(preset="demo", text_dim=256, **changes))
    return flops.training_flops_per_image(shape, 16, TEXT_TOKENS)


def test_every_arm_gets_the_steps_that_the_budget_pays_for(read, document):
    suite = read(copy.deepcopy(document))["tiny"]
    base = expected()
    assert suite.budget_flops == 640 * base
    (part,) = suite.arms["baseline"].parts
    assert (part.steps, part.samples, part.flops) == (80, 640, suite.budget_flops)
    (dense,) = suite.arms["dense"].parts
    per_image = expected(dense_moe_strategy="all_dense", mlp_ratio=4.0)
    assert dense.flops_per_image == per_image
    assert dense.steps == suite.budget_flops // (per_image * 8)
    first, second = suite.arms["ladder"].parts
    for part, share, factor in ((first, 0.75, 4.0), (second, 0.25, 2.0)):
        per_step = 8 * expected(capacity_factors=(factor,))
        assert part.steps == int(suite.budget_flops * share // per_step)
        assert 0 <= suite.budget_flops * share - part.flops < per_step
    assert suite.arms["merged"].parts == ()


def test_the_bench_gives_seed_length_and_data_itself(read, document):
    values = read(copy.deepcopy(document))["tiny"].arms["baseline"].parts[0].values
    assert "seed" not in values["training"]
    assert "train_steps" not in values["training"]
    assert "data_path" not in values["data"]
    assert values["training"]["global_batch_size"] == 8


def test_a_changed_setting_is_another_run_and_only_where_it_counts(read, document):
    before = read(copy.deepcopy(document))["tiny"]
    changed = copy.deepcopy(document)
    changed["suites"]["tiny"]["arms"]["dense"]["set"]["optimizer"] = {"lr": 1e-3}
    after = read(changed)["tiny"]
    same = {n: before.run_key(before.arms[n]) == after.run_key(after.arms[n]) for n in before.arms}
    assert same == {"baseline": True, "dense": False, "ladder": True, "merged": True}
    changed = copy.deepcopy(document)
    changed["suites"]["tiny"]["evaluate"] = {"prompts": {"prompts_per_skill": 3}}
    after = read(changed)["tiny"]
    for name in before.arms:  # pictures are drawn again, nothing is trained again
        assert before.run_key(before.arms[name]) == after.run_key(after.arms[name])
        assert before.row_key(before.arms[name]) != after.row_key(after.arms[name])


def test_checkpoints_that_a_run_leaves(read, document):
    values = copy.deepcopy(document)
    suite = values["suites"]["tiny"]
    suite["arms"]["merged"]["merge"]["last"] = 4  # 80 steps, one checkpoint every 20
    assert read(values)["tiny"].arms["baseline"].parts[0].kept_checkpoints == 4
    suite["arms"]["baseline"] = {"set": {"training": {"keep_last_checkpoints": 1, "keep_last_weights": 2}}}
    suite["arms"]["merged"]["merge"]["last"] = 3
    assert read(values)["tiny"].arms["baseline"].parts[0].kept_checkpoints == 3


def _set(path: str, value: object):
    """Change one entry of the document; ``None`` deletes it."""

    def change(values: dict) -> None:
        *folders, key = path.split("/")
        for name in folders:
            values = values[name]
        if value is None:
            del values[key]
        else:
            values[key] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arms/dense/set/modle", {"num_experts": 4}, r"arms.dense: unknown section 'modle' \(did you mean model\?\)"),
        ("arms/dense/set/model/mlp_ration", 2, r"unknown key 'model.mlp_ration' \(did you mean mlp_ratio"),
        ("arms/dense/set/training", {"seed": 3}, "arms.dense: set.training.seed: the bench gives this itself"),
        ("arms/dense/set/training", {"save_interval": -1}, "arms.dense: --save-interval -1: must be at least 0"),
        ("arms/dense/sett", {}, r"arms.dense: unknown key 'sett' \(did you mean set"),
        ("arms/merged/from", "basline", r"from: there is no trained arm 'basline' \(did you mean"),
        ("arms/merged/merge/last", 5, "merges 5 checkpoints, but 'baseline' leaves 4 after its 80 steps"),
        ("arms/merged/merge/weights", "invers_sqrt", r"merge: --weights invers_sqrt: unknown \(did you mean"),
        ("arms/ladder/stages", 3, "arms.ladder: stages: expected a list"),
        ("seeds", [4], "seeds 4: error bars need at least 2 seeds"),
        ("seeds", [4, 4], "seeds 4 4: each once"),
        ("min_seeds", None, "seeds 0 1: error bars need at least 3 seeds; for a trial write min_seeds: 2"),
        ("min_seeds", 1, "suites.tiny: min_seeds 1: must be at least 2"),
        ("arms/ladder/set", {"model": {"num_experts": 64}},
         r"suites.tiny: arms.ladder: stages\[0\]: --num-experts 64: bucket 1024x1024 at --resolution-px 32 has 16 "),
        ("arms/dense/set/data", {"resolution_px": 36},
         "suites.tiny: arms.dense: --resolution-px 36 is not a positive multiple of 8"),
        ("arms/dense/set/validation", {"valid_resolutions_px": [36]},
         "suites.tiny: arms.dense: --valid-resolutions-px 36 is not a positive multiple of 8"),
        ("set/data", {"resolution_px": 36}, "suites.tiny: arms.baseline: --resolution-px 36 is not a positive"),
        ("set/model", {"num_experts": 17}, "suites.tiny: arms.baseline: --num-experts 17: bucket 1024x1024 at"),
        ("arms/dense/set/data", {"caption_drop_frac": 2}, "suites.tiny: arms.dense: caption_drop_frac 2.0: between"),
        ("arms/dense/set/flow", {"sigma_std": float("nan")}, r"arms.dense: flow.sigma_std: expected a finite number"),
        ("arms/merged/merge/ema_decay", "fast", "arms.merged: merge.ema_decay: expected a number, got 'fast'"),
        ("corpus/scenes", {"scene_sizes": ["3x3"]}, "suites.tiny: corpus: --scene-sizes 3x3: both sides"),
        ("budget_flops", 1e9, "give exactly one of budget_samples and budget_flops"),
        ("budget_samples", 4, "pay for no step"),
        ("set/validation/valid_samples", 0, "validation.valid_samples is 0"),
        ("baseline", "bse", r"baseline: there is no arm 'bse'"),
        ("corpus/curation/inspect", {"min_sid_px": 3}, r"corpus: curation: unknown key 'inspect.min_sid_px'"),
        ("evaluate", {"prompt": {}}, r"evaluate: unknown section 'prompt' \(did you mean prompts"),
        ("comparisons", [{"name": "n", "claim": "c", "baseline": "dense", "arm": "x"}], "arm: no arm 'x'"),
        ("text_tokens", None, "suites.tiny: text_tokens is missing"),
    ],
)  # fmt: skip
def test_refused(read, document, path, value, message):
    values = copy.deepcopy(copy.deepcopy(document))
    _set(f"suites/tiny/{path}", value)(values)
    with pytest.raises(ConfigError, match=message):
        read(values)


def test_the_example_compares_dense_and_moe_of_the_same_active_size():
    for suite in read_suites(ROOT / "examples" / "scenes" / "ablations.yaml").values():
        moe, dense = suite.arms["baseline"], suite.arms["dense"]
        assert abs(moe.active_parameters / dense.active_parameters - 1) < 0.02
        assert moe.parameters > 1.3 * dense.parameters
        for arm in suite.arms.values():
            spent = sum(part.flops for part in arm.parts)
            assert arm.source or 0.995 < spent / suite.budget_flops <= 1
        assert suite.arms["coupled"].parts[0].shape.decoupled_routing is False


def test_experts_need_tokens_in_every_bucket_of_the_scenes(read, document):
    """16 experts fit the square bucket of 32 px; the widest has 40 x 24 px, 15 tokens, where scenes are that wide."""
    suite = document["suites"]["tiny"]
    suite["set"]["model"] = {"num_experts": 16}
    assert read(document)["tiny"].arms["baseline"].parts[0].shape.num_experts == 16
    suite["corpus"]["scenes"] = {"scene_sizes": ["32x32", "56x32"]}
    with pytest.raises(
        ConfigError, match=r"arms.baseline: --num-experts 16: bucket 1344x768 at .* has 15 image"
    ):
        read(document)
