"""Curriculum settings: what they mean, that they survive a round trip, and what is refused, by name."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from megatron_nucleus.data.curriculum import CurriculumConfig, Phases
from megatron_nucleus.data.index import EPISODE_BUCKETS, TIERS
from megatron_nucleus.utils.errors import ConfigError

LABEL = "run.yaml: curriculum.phases"
EXAMPLE = yaml.safe_load("""
- at_samples: 0
  tiers: {A1: 4, A2: 3, A3: 2, A4: 1, A5: 1}
  episodes: {B1: 8, B2: 7, B3: 6, B4: 5, B5: 4, B6: 3, B7: 2, B8: 1}
- at_samples: 2000000
  table: {A1: {B1: 1, B2: 1}, A4: {B8: 3}}
  captions: {short: 1, medium: 1, detailed: 2}
  caption_drop_frac: 0.1
- at_samples: 3e6
  tiers: {A5: 1e-3}
""")
EVERYTHING = np.ones((5, 8), bool)


def cell(shares, tier, episode):
    return shares[TIERS.index(tier), EPISODE_BUCKETS.index(episode)]


def test_tables_are_read_as_shares():
    product, table, tiers = (p.shares(EVERYTHING) for p in Phases.from_plain(EXAMPLE, LABEL).phases)
    assert cell(product, "A1", "B1") == pytest.approx(4 * 8 / (11 * 36))
    assert cell(product, "A5", "B8") == pytest.approx(1 / (11 * 36))
    assert cell(table, "A1", "B2") == pytest.approx(0.2)
    assert cell(table, "A4", "B8") == pytest.approx(0.6)
    assert np.count_nonzero(table) == 3
    assert tiers[4].tolist() == [1 / 8] * 8
    for shares in (product, table, tiers):
        assert shares.sum() == pytest.approx(1, abs=1e-15)


def test_a_factor_left_out_spreads_over_what_there_is():
    present = np.zeros((5, 8), bool)
    present[4, :3] = present[0, 5] = True
    shares = Phases.from_plain(EXAMPLE, LABEL).phases[2].shares(present)
    assert shares[4].tolist() == [0.25, 0.25, 0.25, 0, 0, 0.25, 0, 0]


def test_phases_survive_yaml_and_compare_by_value():
    phases = Phases.from_plain(EXAMPLE, LABEL)
    plain = yaml.safe_load(yaml.safe_dump(phases.to_plain()))
    assert plain[0]["tiers"] == EXAMPLE[0]["tiers"]
    assert plain[1]["table"] == EXAMPLE[1]["table"]
    again = Phases.from_plain(plain, "--phases")
    assert again == phases
    assert hash(again) == hash(phases)
    assert (again.label, phases.label) == ("--phases", LABEL)
    assert [p.at_samples for p in again.phases] == [0, 2_000_000, 3_000_000]


def phase(**changes):
    made = {"at_samples": 0, "table": {"A1": {"B1": 1}}, **changes}
    return {key: value for key, value in made.items() if value != "absent"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("A1: 1", "expected a list of phases"),
        ([], "expected a list of phases.*null for no curriculum"),
        (["A1"], r"\[0\]: expected a mapping"),
        ([phase(tables={})], r"\[0\]: unknown key 'tables' \(did you mean table\?\)"),
        ([phase(at_samples="absent")], r"\[0\].at_samples is required"),
        ([phase(at_samples=5)], r"\[0\].at_samples 5: the first phase starts at 0"),
        ([phase(at_samples=-1)], r"\[0\].at_samples -1: 0 or more"),
        ([phase(at_samples=1.5)], r"\[0\].at_samples: expected a whole number"),
        ([phase(at_samples="soon")], r"\[0\].at_samples: expected a whole number"),
        ([phase(), phase(at_samples=9), phase(at_samples=9)], r"\[2\].at_samples 9: must lie above the 9"),
        ([phase(), phase(at_samples=9), phase(at_samples=3)], r"\[2\].at_samples 3: must lie above the 9"),
        ([phase(tiers={"A1": 1})], r"\[0\]: has both table and tiers"),
        ([phase(table="absent")], r"\[0\]: has neither; give table, or tiers and episodes"),
        (
            [phase(table={"A9": {"B1": 1}})],
            r"\[0\].table: unknown name 'A9' \(did you mean A5\?\)|A9.*one of A1",
        ),
        ([phase(table={"A1": {"b1": 1}})], r"\[0\].table.A1: unknown name 'b1'.*one of B1, B2"),
        ([phase(table={"A1": 3})], r"\[0\].table.A1: expected a mapping of B1"),
        ([phase(table={"A1": {"B1": 0}, "A2": {}})], r"\[0\].table: the weights add up to 0"),
        (
            [phase(table={"A1": {"B1": 1e308}, "A2": {"B1": 1e308}})],
            r"\[0\].table: the weights add up to inf",
        ),
        ([phase(table="absent", tiers={"A1": 1, "A6": 2})], r"\[0\].tiers: unknown name 'A6'"),
        ([phase(table="absent", episodes={"B9": 2})], r"\[0\].episodes: unknown name 'B9'"),
        ([phase(table="absent", tiers={"A1": -0.5})], r"\[0\].tiers.A1 -0.5: a weight is a finite number"),
        (
            [phase(table="absent", tiers={"A1": float("nan")})],
            r"\[0\].tiers.A1: expected a finite number, got nan",
        ),
        ([phase(table="absent", tiers={"A1": ".inf", "A2": 1})], r"\[0\].tiers.A1"),
        (
            [phase(table="absent", tiers={"A1": float("inf")})],
            r"\[0\].tiers.A1: expected a finite number, got inf",
        ),
        ([phase(table="absent", tiers={"A1": "much"})], r"\[0\].tiers.A1: expected a number, got 'much'"),
        ([phase(table="absent", tiers={"A1": True})], r"\[0\].tiers.A1: expected a number, got True"),
        ([phase(table="absent", tiers={"A1": 0})], r"\[0\].tiers: the weights add up to 0"),
        ([phase(captions={"short": 0, "medium": 0})], r"\[0\].captions: the weights add up to 0"),
        ([phase(captions={"long": 1})], r"\[0\].captions: unknown name 'long'"),
        ([phase(captions=["short"])], r"\[0\].captions: expected a mapping of short"),
        ([phase(caption_drop_frac=1.1)], r"\[0\].caption_drop_frac 1.1: between 0 and 1"),
        (
            [phase(caption_drop_frac=float("nan"))],
            r"\[0\].caption_drop_frac: expected a finite number, got nan",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(raw, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Phases.from_plain(raw, LABEL)
    assert str(caught.value).startswith(LABEL)
    assert "\n" not in str(caught.value)


def test_the_floor_must_fit():
    phases = Phases.from_plain(EXAMPLE[:1], LABEL)
    assert CurriculumConfig(phases, 0.125).floor_frac == 0.125  # eight of it fill the whole
    with pytest.raises(ConfigError, match="8 episode buckets.*8 x 0.13 is more than 1; give at most 0.125"):
        CurriculumConfig(phases, 0.13)
    for floor in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="curriculum.floor_frac"):
            CurriculumConfig(None, floor)
