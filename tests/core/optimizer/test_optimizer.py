"""The whole optimizer: values of a step, exact resume, bad input."""

import dataclasses

import pytest
import torch

from megatron_nucleus.core.models.nucleus import NucleusTransformer
from megatron_nucleus.core.models.presets import ModelShape
from megatron_nucleus.core.optimizer.optimizer import OptimizerConfig, build_optimizer
from megatron_nucleus.utils import config as config_lib
from megatron_nucleus.utils.errors import ConfigError

SHAPE = ModelShape(
    num_layers=2, num_attention_heads=2, attention_head_dim=32, num_key_value_heads=1, text_dim=24,
    latent_channels=4, patch_size=2, axes_dims_rope=(8, 12, 12), mlp_ratio=4.0,
    dense_moe_strategy="leave_first_block_dense", num_experts=4, moe_intermediate_dim=16,
    capacity_factors=(0.0, 2.0), use_sigmoid=False, route_scale=2.5,
)  # fmt: skip


def new_model() -> NucleusTransformer:
    model = NucleusTransformer(SHAPE, seed=0)
    with torch.no_grad():  # away from the zeros of the initialisation, so that everything has a gradient
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model


def set_gradients(model, step: int) -> None:
    for i, p in enumerate(model.parameters()):
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))


def run(model, optimizer, steps) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step(0.01 * (step + 1))
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_resume_is_exact(kind):
    config = OptimizerConfig(optimizer=kind, lr_factors=("router=0.5", "experts=2"))
    whole = new_model()
    whole_optimizer = build_optimizer(whole, config)
    run(whole, whole_optimizer, range(5))

    first = new_model()
    optimizer = build_optimizer(first, config)
    run(first, optimizer, range(2))
    saved = {name: t.clone() for name, t in optimizer.tensors().items()}
    scalars = optimizer.scalars()

    second = new_model()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, config)
    assert list(resumed.tensors()) == list(saved)
    for name, tensor in resumed.tensors().items():
        assert not tensor.any(), name
        tensor.copy_(saved[name])
    resumed.load_scalars(scalars)
    run(second, resumed, range(2, 5))
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    for name, tensor in whole_optimizer.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    assert resumed.scalars() == whole_optimizer.scalars() == {"updates": 5}


def test_adamw_equals_torch_with_decay_on_matrices_only():
    config = OptimizerConfig(
        optimizer="adamw", weight_decay=0.3, lr_factors=("modulation=0.5",), router_orthogonality=0.0
    )
    ours, theirs = new_model(), new_model()
    optimizer = build_optimizer(ours, config)
    groups = {}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            factor = 0.5 if name.endswith("modulation.weight") and name.startswith("blocks") else 1.0
            groups.setdefault((factor, p.ndim > 1), []).append(p)
    reference = torch.optim.AdamW(
        [
            {"params": ps, "lr": 0.01 * factor, "weight_decay": 0.3 if decay else 0.0}
            for (factor, decay), ps in groups.items()
        ],
        betas=(0.9, 0.95), eps=1e-8, foreach=False,
    )  # fmt: skip
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(0.01)
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_state_names_cover_every_trainable_parameter_once():
    model = new_model()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    tensors = build_optimizer(model, OptimizerConfig()).tensors()
    muon = {n.removeprefix("muon.momentum.") for n in tensors if n.startswith("muon.momentum.")}
    first = {n.removeprefix("adamw.exp_avg.") for n in tensors if n.startswith("adamw.exp_avg.")}
    second = {n.removeprefix("adamw.exp_avg_sq.") for n in tensors if n.startswith("adamw.exp_avg_sq.")}
    assert first == second
    assert muon | first == names
    assert not muon & first
    parameters = dict(model.named_parameters())
    assert all(t.shape == parameters[n.split(".", 2)[2]].shape for n, t in tensors.items())
    assert "muon.momentum.blocks.1.moe.experts.gate_up" in tensors
    assert "adamw.exp_avg.blocks.1.moe.router.weight" in tensors


def test_frozen_parameters_do_not_move():
    model = new_model()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig())
    run(model, optimizer, range(1))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def test_one_learning_rate_moves_muon_and_adamw_alike():
    """RMS of the first update: lr for AdamW (sign of the gradient), about 0.2 lr for Muon in any shape."""
    model = new_model()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    set_gradients(model, 0)
    optimizer.step(1e-3)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        rms = float((p.detach() - before[name]).square().mean().sqrt()) / 1e-3
        low, high = (0.12, 0.25) if name in {q.name for q in optimizer.muon.params} else (0.99, 1.01)
        assert low < rms < high, (name, rms)


def test_missing_gradient_is_named():
    model = new_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    set_gradients(model, 0)
    model.blocks[1].moe.router.weight.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=r"blocks\.1\.moe\.router\.weight.*no gradient"):
        optimizer.step(0.1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)), (
        "nothing was applied"
    )


def test_low_precision_parameters_are_refused():
    with pytest.raises(ConfigError, match="keep parameters in float32"):
        build_optimizer(new_model().to(torch.bfloat16), OptimizerConfig())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("muon_momentum", 1.0),
        ("adam_beta2", -0.1),
        ("muon_num_ns_steps", 2),
        ("weight_decay", float("inf")),
        ("clip_grad", -1.0),
        ("router_orthogonality", -1e-7),
        ("router_orthogonality", float("nan")),
        ("optimizer", "sgd"),
        ("lr_factors", ["rooter=1"]),
    ],
)
def test_bad_values_name_the_key(key, value):
    run_config = dataclasses.make_dataclass("Run", [("optimizer", OptimizerConfig)], frozen=True)
    with pytest.raises(ConfigError, match=key.replace("_", "[_-]")):
        config_lib.from_dict(run_config, {"optimizer": {key: value}})
