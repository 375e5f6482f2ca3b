"""The sampler's arithmetic and its invariances."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from megatron_nucleus.inference import sampler
from megatron_nucleus.inference.sampler import SamplerConfig, check_sampler, guide, sample_latents, stack_text
from megatron_nucleus.types import TextFeatures, TextKV
from megatron_nucleus.utils.errors import ConfigError

GRID = (3, 4)


def noise(batch=2, seed=1):
    return torch.randn(batch, GRID[0] * GRID[1], 64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def text_of(model, lengths, seed, masked=None):
    """Projected text of the given true lengths (masked where they differ)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lengths), max(lengths), 256, generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    masked = len(set(lengths)) > 1 if masked is None else masked
    return model.project_text(features, mask if masked else None, GRID), TextFeatures(features, mask)


class Recorder(torch.nn.Module):
    """Calls the given function instead of a network and remembers the batch sizes and noise levels."""

    def __init__(self, velocity, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        self.velocity, self.calls = velocity, []

    def forward(self, x, sigma, text, grid):
        self.calls.append((len(x), x.dtype, sigma.tolist(), text))
        return self.velocity(x, sigma, text)


def dummy_text(batch, length=2, grid=GRID):
    zeros = torch.zeros(batch, length, 1, 2)
    return TextKV((zeros,), (zeros,), None, grid)


def test_guide_against_the_written_formula():
    g = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 5, 64, generator=g), torch.randn(2, 5, 64, generator=g)
    got = guide(positive, negative, 4.0)
    for b in range(2):
        for s in range(5):
            combined = negative[b, s] + 4.0 * (positive[b, s] - negative[b, s])
            want = combined * positive[b, s].square().sum().sqrt() / combined.square().sum().sqrt()
            torch.testing.assert_close(got[b, s], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.norm(dim=-1), positive.norm(dim=-1))


def test_a_combination_of_zero_stays_zero():
    positive = torch.zeros(1, 2, 4)
    positive[0, 1] = 1.0
    got = guide(positive, positive.clone(), 3.0)
    assert torch.equal(got, positive)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_perfect_velocity_ends_at_the_clean_latents(shift):
    clean, start = noise(seed=5), noise(seed=6)
    model = Recorder(lambda x, sigma, text: clean - start)
    got = sample_latents(model, start, dummy_text(2), None, GRID, steps=7, guidance=1.0, shift=shift)
    torch.testing.assert_close(got, clean, rtol=1e-5, atol=1e-5)
    levels = [call[2][0] for call in model.calls]
    want = [1 - i / 7 for i in range(7)]
    want = [shift * s / (1 + (shift - 1) * s) for s in want]
    assert levels == pytest.approx(want, rel=1e-6)
    assert levels[0] == 1.0


def test_steps_follow_the_definition(tiny_model):
    """An independent loop: x += (sigma - sigma_next) * guided velocity."""
    text, features = text_of(tiny_model, [5, 3], seed=2)
    negative, negative_features = text_of(tiny_model, [1, 4], seed=3)
    got = sample_latents(tiny_model, noise(), text, negative, GRID, steps=4, guidance=3.0, shift=2.0)
    x = noise()
    sigmas = [2 * s / (1 + s) for s in (1.0, 0.75, 0.5, 0.25)] + [0.0]
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            level = torch.full((2,), sigma)
            positive = tiny_model(x, level, features, GRID)  # text projected anew in every block and step
            against = tiny_model(x, level, negative_features, GRID)
            combined = against + 3.0 * (positive - against)
            combined = combined * positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
            x = x + (sigma - following) * combined
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 0.7, 1.0])
def test_without_guidance_the_negative_text_is_never_used(tiny_model, guidance):
    text, _ = text_of(tiny_model, [4, 4], seed=2)
    negative, _ = text_of(tiny_model, [2, 2], seed=3)
    with_it = sample_latents(tiny_model, noise(), text, negative, GRID, 3, guidance)
    without = sample_latents(tiny_model, noise(), text, None, GRID, 3, guidance)
    assert torch.equal(with_it, without)
    counter = Recorder(lambda x, sigma, text: x)
    sample_latents(counter, noise(), dummy_text(2), dummy_text(2), GRID, 3, guidance)
    assert [call[0] for call in counter.calls] == [2, 2, 2]


@pytest.mark.parametrize(
    ("lengths", "negative_lengths"), [((5, 3), (1, 1)), ((2, 2), (4, 2)), ((3, 3), (3, 3))]
)
def test_one_call_equals_two(tiny_model, monkeypatch, lengths, negative_lengths):
    text, _ = text_of(tiny_model, lengths, seed=2)
    negative, _ = text_of(tiny_model, negative_lengths, seed=3)
    results = []
    for tokens, sizes in ((0, [2, 2]), (10**6, [4])):
        monkeypatch.setattr(sampler, "ONE_CALL_TOKENS", tokens)
        calls = []
        hook = tiny_model.register_forward_hook(lambda m, args, out, calls=calls: calls.append(len(args[0])))
        results.append(sample_latents(tiny_model, noise(), text, negative, GRID, 1, 4.0))
        hook.remove()
        assert calls == sizes
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(tiny_model):
    text, _ = text_of(tiny_model, [5, 3, 1], seed=2)
    negative, _ = text_of(tiny_model, [2, 2, 2], seed=3)
    start = noise(3)
    together = sample_latents(tiny_model, start, text, negative, GRID, 3, 4.0)
    for i in range(3):
        one = TextKV(
            tuple(k[i : i + 1] for k in text.k_BLGK),
            tuple(v[i : i + 1] for v in text.v_BLGK),
            text.mask_BL[i : i + 1],
            GRID,
        )
        against, _ = text_of(tiny_model, [2, 2, 2], seed=3)
        against = TextKV(
            tuple(k[i : i + 1] for k in against.k_BLGK),
            tuple(v[i : i + 1] for v in against.v_BLGK),
            None,
            GRID,
        )
        alone = sample_latents(tiny_model, start[i : i + 1], one, against, GRID, 3, 4.0)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


def test_stacked_and_padded_text_gives_the_same_velocity(tiny_model):
    short, _ = text_of(tiny_model, [2], seed=2)
    long, _ = text_of(tiny_model, [6], seed=3)
    both = stack_text([short, long])
    assert both.mask_BL.tolist() == [[True] * 2 + [False] * 4, [True] * 6]
    x, sigma = noise(), torch.tensor([0.8, 0.3])
    with torch.no_grad():
        together = tiny_model(x, sigma, both, GRID)
        for i, text in enumerate((short, long)):
            alone = tiny_model(x[i : i + 1], sigma[i : i + 1], text, GRID)
            torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    assert stack_text([long, long]).mask_BL is None


def test_latents_stay_fp32_for_a_bf16_model():
    step = torch.full((2, 12, 64), 2.0**-9, dtype=torch.bfloat16)  # lost when added to 1.0 in bf16
    model = Recorder(lambda x, sigma, text: step, torch.bfloat16)
    got = sample_latents(model, torch.ones(2, 12, 64), dummy_text(2), None, GRID, steps=4, guidance=1.0)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.full((2, 12, 64), 1.0 + 2.0**-9))
    assert {call[1] for call in model.calls} == {torch.bfloat16}


def test_on_step_sees_every_state(tiny_model):
    text, _ = text_of(tiny_model, [2, 2], seed=2)
    seen = []
    got = sample_latents(
        tiny_model, noise(), text, None, GRID, 3, 1.0, on_step=lambda i, x: seen.append((i, x))
    )
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], got)
    assert not torch.equal(seen[0][1], got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"guidance": -1.0}, "--guidance -1.0"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"shift": 0.0}, "--shift 0.0: must be a positive number"),
        ({"height": 0}, "--height 0"),
        ({"width": -8}, "--width -8"),
    ],
)
def test_settings_that_can_draw_nothing(change, message):
    with pytest.raises(ConfigError, match=message):
        check_sampler(SamplerConfig(**change))


def test_guidance_without_a_negative_text():
    with pytest.raises(ConfigError, match=r"--guidance 2.0: .*negative text"):
        sample_latents(types.SimpleNamespace(), noise(), dummy_text(2), None, GRID, 2, 2.0)


# --- the routing hook ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "limit"), [(1.0, 0), (3.0, 0), (3.0, 10**6)])
def test_routings_are_those_of_the_prompts(tiny_model, monkeypatch, guidance, limit):
    """Without guidance, with two calls a step, and with one call for both texts."""
    monkeypatch.setattr(sampler, "ONE_CALL_TOKENS", limit)
    text, _ = text_of(tiny_model, [5, 3], seed=2)
    negative, _ = text_of(tiny_model, [1, 4], seed=3)
    states, heard = [noise()], []
    args = (tiny_model, noise(), text, negative, GRID, 3, guidance, 2.0)
    got = sample_latents(
        *args,
        on_step=lambda i, x: (states.append(x), heard.append(("step", i))),
        on_routing=lambda *call: heard.append(("routing", *call)),
    )
    assert torch.equal(got, sample_latents(*args))
    assert [event[:2] for event in heard] == [(kind, i) for i in range(3) for kind in ("routing", "step")]
    for _, i, sigma, routings in heard[::2]:
        assert sigma == pytest.approx([1.0, 0.8, 0.5][i])
        with torch.no_grad():
            _, want = tiny_model(states[i], torch.full((2,), sigma), text, GRID, return_routing=True)
        assert len(routings) == len(want) == 2
        for ours, theirs in zip(routings, want, strict=True):
            assert torch.equal(ours.index_BEC, theirs.index_BEC)
            torch.testing.assert_close(ours.weight_BEC, theirs.weight_BEC)
            torch.testing.assert_close(ours.logits_BSE, theirs.logits_BSE, rtol=1e-4, atol=1e-5)


def test_without_the_hook_no_routing_is_asked_for():
    """The stand-in model takes no ``return_routing``."""
    model = Recorder(lambda x, sigma, text: x)
    sample_latents(model, noise(), dummy_text(2), None, GRID, 2, 1.0)
    with pytest.raises(TypeError, match="return_routing"):
        sample_latents(model, noise(), dummy_text(2), None, GRID, 2, 1.0, on_routing=lambda *call: None)
