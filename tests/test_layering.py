"""Imports go downward only (README, "Who may import whom")."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_nucleus"

# Level of every part; a part may import its own part and lower levels. Two parts of one level never meet.
LEVELS = {
    "types": 0, "utils": 0, "ops": 1, "backends": 1, "core": 2, "data": 2, "export": 3, "inference": 3,
    "evaluation": 3, "training": 4,
}  # fmt: skip
# Parts of one level that may meet, with the reason.
ALLOWED_PAIRS = {
    ("backends", "ops"),  # an adapter may build on a reference
    ("inference", "export"),  # a pipeline is loaded from a checkpoint
    ("evaluation", "inference"),  # scores are taken of sampled pictures
    ("evaluation", "export"),  # and reports describe checkpoints
}
# Single modules that a part may import against the rule, with the reason.
EXCEPTIONS = {
    ("data/features.py", "core.patches"): "a batch holds packed latents; packing has one home",
}
OPTIONAL = {"triton", "flash_attn", "transformer_engine", "apex", "deep_ep", "torchao", "nvidia", "ray",
            "diffusers", "transformers", "peft"}  # fmt: skip
PURE = (
    "core/models",
    "core/transformer",
    "core/moe/router.py",
    "core/moe/experts.py",
    "core/moe/moe_layer.py",
)


def files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    part = part_of(path)
    if part == "__init__":
        return
    relative = str(path.relative_to(ROOT / PACKAGE))
    for name in imports(path):
        if not name.startswith(PACKAGE + ".") or name.startswith(PACKAGE + ".__version__"):
            continue
        target = name.split(".")[1]
        if target in (part, "_C", "_C_cuda"):
            continue
        rest = name.removeprefix(PACKAGE + ".")
        if any(relative == f and (rest == m or rest.startswith(m + ".")) for f, m in EXCEPTIONS):
            continue
        assert target in LEVELS, f"{relative} imports {name}: a part that test_layering does not know"
        lower = LEVELS[target] < LEVELS[part]
        assert lower or (part, target) in ALLOWED_PAIRS, f"{relative} (level {LEVELS[part]}) imports {name}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_libraries_are_never_imported_at_package_import(path):
    if part_of(path) == "backends":
        return  # loaded by the registry alone
    for name in imports(path, top_level_only=True):
        assert name.split(".")[0] not in OPTIONAL, f"{path.relative_to(ROOT)} imports {name} at its top"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_model_and_data_files_know_no_process_groups(path):
    relative = str(path.relative_to(ROOT / PACKAGE))
    if not relative.startswith((*PURE, "data")):
        return
    for name in imports(path):
        assert not name.startswith(("torch.distributed", f"{PACKAGE}.core.parallel_state")), (
            f"{relative}: {name}"
        )


@pytest.mark.parametrize("path", sorted((ROOT / "triton_ops").rglob("*.py")), ids=lambda p: p.name)
def test_triton_ops_stand_alone(path):
    for name in imports(path):
        assert not name.startswith(PACKAGE), f"{path.name} imports {name}"


def test_importing_the_package_loads_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, megatron_nucleus; print(sorted({'torch','diffusers','triton'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
