"""Dataclasses -> flags and YAML -> one checked configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_nucleus.utils import config as cfg
from megatron_nucleus.utils.config import Parser, knob
from megatron_nucleus.utils.config_files import Origins, read_yaml
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
        (["--train-steps", "inf"], None, "^--train-steps: expected a whole number, got 'inf'$"),
        (["--lr", "nan"], None, "^--lr: expected a finite number, got 'nan'$"),
        (["--lr", "1e999"], None, "^--lr: expected a finite number, got '1e999'$"),
        (["--train-steps", "5", "--limit=-inf"], None, "^--limit: expected a finite number, got '-inf'$"),
        (["--betas", "0.9", "NaN"], None, "^--betas: expected a finite number, got 'NaN'$"),
        ([], "optim: {lr: .nan}", r"c\.yaml: optim\.lr: expected a finite number, got nan$"),
        ([], "optim: {betas: [0.9, .inf]}", r"c\.yaml: optim\.betas: expected a finite number, got inf$"),
        ([], f"optim: {{lr: 1{400 * '0'}}}", r"c\.yaml: optim\.lr: expected a number, got 10"),
    ],
)
def test_bad_input_is_named(argv, yaml, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(argv, yaml, tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")


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


class Table:
    """A structured knob."""

    def __init__(self, rows):
        self.rows = rows

    @classmethod
    def from_plain(cls, raw, label):
        if not isinstance(raw, list):
            raise ConfigError(f"{label}: expected a list of rows, got {raw!r}")
        return cls(tuple(raw))

    def to_plain(self):
        return list(self.rows)


@dataclasses.dataclass(frozen=True)
class Mix:
    """A mixture."""

    table: Table | None = knob(None, "rows")
    total_rows: int = knob(2, "rows that are allowed")

    def __post_init__(self):
        if self.table is not None and len(self.table.rows) > self.total_rows:
            raise ConfigError(f"total_rows {self.total_rows}: the table has {len(self.table.rows)}")


@dataclasses.dataclass(frozen=True)
class WithMix:
    mix: Mix


def load_mix(argv, path=None):
    parser = Parser(prog="t")
    cfg.add_arguments(parser, WithMix)
    return cfg.load(WithMix, parser.parse_args(argv), path)


def test_structured_knob_from_yaml_from_a_flag_and_back(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("mix: {table: [a, 1]}")
    assert load_mix([], path).mix.table.rows == ("a", 1)
    assert load_mix(["--table", "[b]"], path).mix.table.rows == ("b",)
    assert load_mix(["--table", "none"], path).mix.table is None
    assert cfg.to_dict(load_mix([], path)) == {"mix": {"table": ["a", 1], "total_rows": 2}}
    with pytest.raises(ConfigError, match=r"^--table: expected a list of rows, got 3$"):
        load_mix(["--table", "3"])
    with pytest.raises(ConfigError, match=r"^--table: not valid YAML"):
        load_mix(["--table", "[3"])


def test_a_file_is_a_difference_to_its_base(tmp_path):
    (tmp_path / "deep").mkdir()
    first, second, third = tmp_path / "1.yaml", tmp_path / "deep" / "2.yaml", tmp_path / "3.yaml"
    first.write_text("optim: {lr: 1e-2, kind: adamw}\nrun: {train_steps: 5, bf16: true}")
    second.write_text("base: ../1.yaml\nrun: {train_steps: 6}")
    third.write_text("base: deep/2.yaml\noptim: {kind: muon}")
    values, origins = read_yaml(third)
    assert values == {"optim": {"lr": "1e-2", "kind": "muon"}, "run": {"train_steps": 6, "bf16": True}}
    assert {key: Path(file).name for key, file in origins.items()} == {
        "optim.lr": "1.yaml", "optim.kind": "3.yaml", "run.train_steps": "2.yaml", "run.bf16": "1.yaml",
    }  # fmt: skip
    first.write_text("optim: {lr: quick}\nrun: {train_steps: 5}")
    parser = Parser(prog="t")
    cfg.add_arguments(parser, All)
    with pytest.raises(ConfigError, match=r"1\.yaml: optim\.lr: expected a number, got 'quick'"):
        cfg.load(All, parser.parse_args([]), third)
    first.write_text("optim: {lrr: 1}\nrun: {train_steps: 5}")
    with pytest.raises(ConfigError, match=r"1\.yaml: unknown key 'optim\.lrr' \(did you mean lr\?\)"):
        cfg.load(All, parser.parse_args([]), third)
    first.write_text("optim: [1]")
    with pytest.raises(ConfigError, match=r"1\.yaml: section 'optim' must be a mapping, got \[1\]"):
        read_yaml(third)


def test_a_base_that_is_missing_or_circular_is_named(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("base: b.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml: base: \S+b\.yaml: no such file"):
        read_yaml(a)
    b.write_text("base: a.yaml")
    with pytest.raises(ConfigError, match=r"is its own base \(\S+a\.yaml -> \S+b\.yaml -> \S+a\.yaml\)"):
        read_yaml(a)
    b.write_text("base: [a.yaml]")
    with pytest.raises(ConfigError, match=r"b\.yaml: base must be the path of one file"):
        read_yaml(a)


def test_errors_of_later_checks_name_the_file_unless_a_flag_gave_the_value(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("mix: {table: [1, 2, 3]}")
    with pytest.raises(ConfigError, match=r"^total_rows 2: the table has 3$"):  # a default: no file to name
        load_mix([], path)
    path.write_text("mix: {table: [1, 2, 3], total_rows: 1}")
    with pytest.raises(ConfigError, match=r"c\.yaml: mix\.total_rows: total_rows 1: the table has 3$"):
        load_mix([], path)
    with pytest.raises(ConfigError, match=r"^total_rows 0: the table has 3$"):
        load_mix(["--total-rows", "0"], path)


def test_origins_find_the_key_that_a_message_names():
    origins = Origins({"optim.lr": "a.yaml", "run.train_steps": "b.yaml", "run.steps": "c.yaml"})
    assert origins.find("--train-steps 0: must be at least 1") == "b.yaml: run.train_steps"
    assert origins.find("optim.lr: must be positive") == "a.yaml: optim.lr"
    assert origins.find("train_steps 3 and --lr 2") == "b.yaml: run.train_steps"  # the first one
    assert origins.find("a few steps later") is None  # an ordinary word
    assert origins.find("--lr-factors x") is None
    assert origins.find("a.yaml: optim.lr: said already") is None


def test_origins_look_at_the_first_key_alone():
    """The keys after it are what the value is compared with: they are not at fault."""
    files = {"data.resolution_px": "a.yaml", "model.capacity_factors": "b.yaml"}
    origins = Origins(files, others={"model.num_experts", "training.init_from"})
    tokens = "--num-experts 32: bucket 1024x1024 at --resolution-px 32 has 16 image tokens"
    start = "--init-from S: it was trained with model.num_experts = 8, now 4; a stage may change capacity_factors only"
    assert origins.find(tokens) is None
    assert origins.find(start) is None
    assert Origins(files | {"model.num_experts": "c.yaml"}).find(tokens) == "c.yaml: model.num_experts"
    assert origins.find("--resolution-px 33: --num-experts 4") == "a.yaml: data.resolution_px"


def test_a_flag_that_overrides_a_file_is_no_fault_of_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim: {lr: 1}\nrun: {train_steps: 5, bf16: true}")
    parser = Parser(prog="t")
    cfg.add_arguments(parser, All)
    _, origins = cfg.load_named(All, parser.parse_args(["--train-steps", "7"]), path)
    assert origins == {"optim.lr": str(path), "run.bf16": str(path)}
    assert origins.others == {"optim.betas", "optim.kind", "run.train_steps", "run.folder", "run.limit"}
    assert origins.find("--train-steps 7: too many for --lr 1") is None
    assert origins.find("--lr 1: too high for --train-steps 7") == f"{path}: optim.lr"
