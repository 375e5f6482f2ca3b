"""Dataclasses -> flags and YAML -> one checked configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config import Parser, knob
from megatron_nucleus.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Optim:
    """How to learn."""

    lr: float = knob(1e-4, "rate", unit="1/step")
    betas: tuple[float, ...] = knob((0.9, 0.95), "decays")
    kind: str = knob("muon", "which", choices=("muon", "adamw"))


@dataclasses.dataclass(frozen=True)
class Run:
    """The run."""

    train_steps: int = knob(help="steps")
    bf16: bool = knob(False, "precision")
    folder: Path = knob(Path("x"), "where")
    limit: float | None = knob(None, "limit")


@dataclasses.dataclass(frozen=True)
class All:
    optim: Optim
    run: Run


def load(argv=(), yaml=None, tmp_path=None):
    parser = Parser(prog="t")
    cfg.add_arguments(parser, All)
    args = parser.parse_args(list(argv))
    path = None
    if yaml is not None:
        path = tmp_path / "c.yaml"
        path.write_text(yaml)
    return cfg.load(All, args, path)


def test_flag_wins_over_file_wins_over_default(tmp_path):
    got = load(
        ["--lr", "3e-3", "--bf16"],
        "optim: {lr: 1e-2, kind: adamw}\nrun: {train_steps: 5, bf16: false}",
        tmp_path,
    )
    assert got == All(Optim(lr=3e-3, kind="adamw"), Run(train_steps=5, bf16=True))
    assert load(["--train-steps", "7", "--no-bf16", "--limit", "none"]).run == Run(train_steps=7)


def test_yaml_exponent_without_a_dot_is_a_number(tmp_path):
    assert load([], "optim: {lr: 1e-4}\nrun: {train_steps: 1e3}", tmp_path).optim.lr == 1e-4


@pytest.mark.parametrize(
    ("argv", "yaml", "message"),
    [
        (["--train-step", "5"], None, r"unknown argument --train-step \(did you mean --train-steps\?\)"),
        (["--train-steps", "five"], None, "--train-steps: expected a whole number, got 'five'"),
        (["--train-steps", "1.5"], None, "whole number"),
        (
            ["--train-steps", "5", "--kind", "moun"],
            None,
            r"'moun' is not allowed \(did you mean muon\?\); one of",
        ),
        ([], None, r"--train-steps\) is required"),
        ([], "optm: {lr: 1}", r"unknown section 'optm' \(did you mean optim\?\)"),
        ([], "optim: {learning_rate: 1}\nrun: {train_steps: 1}", "unknown key 'optim.learning_rate'"),
        ([], "optim: {Lr: 1}\nrun: {train_steps: 1}", "did you mean lr"),
        ([], "optim: 3", "section 'optim' must be a mapping"),
        ([], "- a", "expected a mapping of sections"),
        ([], "optim: [", "not valid YAML"),
        ([], "run: {train_steps: 1, bf16: 'yes'}", "expected true or false, got 'yes'"),
        ([], "run: {train_steps: true}", "expected a whole number, got True"),
    ],
)
def test_bad_input_is_named(argv, yaml, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(argv, yaml, tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        cfg.read_yaml(tmp_path / "none.yaml")


def test_round_trip(tmp_path):
    import yaml

    config = load(["--train-steps", "5", "--betas", "0.1", "0.2", "0.3"])
    text = yaml.safe_dump(cfg.to_dict(config))
    assert load([], text, tmp_path) == config


def test_help_shows_groups_units_and_defaults():
    parser = Parser(prog="t")
    cfg.add_arguments(parser, All)
    text = parser.format_help()
    assert "optim:" in text
    assert "How to learn." in text
    assert "1/step, default 0.0001" in " ".join(text.split())
