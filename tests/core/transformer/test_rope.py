"""Rotary positions: values against the formula written out, and the properties that make them relative."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from megatron_nucleus.core.transformer.rope import rope_table
from megatron_nucleus.data import buckets
from megatron_nucleus.ops.norm_rope import rotate

AXES = (4, 6, 6)
PUBLISHED_AXES = (16, 56, 56)
TEXT_TOKENS = 9
# (rows, columns) of every bucket at every published resolution (a token is 16 px wide), and odd grids.
BUCKET_GRIDS = sorted(
    {
        (height_px // 16, width_px // 16)
        for base_px in (1024, 512, 256)
        for width_px, height_px in (buckets.size(bucket, base_px, 16) for bucket in buckets.BUCKETS)
    }
)
ODD_GRIDS = [(1, 1), (1, 9), (9, 1), (3, 5), (5, 3), (17, 29), (63, 65)]
CPU = torch.device("cpu")


def rotation(position: tuple[int, int, int]) -> list[complex]:
    """exp(i * p * 10000^(-2j/d)) for pair j of each axis with d channels."""
    return [
        cmath.exp(1j * p * 10000.0 ** (-2 * j / dim))
        for p, dim in zip(position, AXES, strict=True)
        for j in range(dim // 2)
    ]


def assert_rotations(actual, positions):
    want = torch.tensor([rotation(p) for p in positions], dtype=torch.complex128)
    torch.testing.assert_close(actual.to(torch.complex128), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "rows", "columns"),
    [
        ((4, 6), range(-2, 2), range(-3, 3)),
        ((3, 5), range(-2, 1), range(-3, 2)),  # odd: the larger half lies before the centre
        ((1, 2), range(-1, 0), range(-1, 1)),
    ],
)
def test_image_tokens_are_centred_on_the_image(grid, rows, columns):
    image, _ = rope_table(AXES, grid, 0, CPU)
    assert_rotations(image, [(0, r, c) for r in rows for c in columns])


@pytest.mark.parametrize(("grid", "first"), [((4, 6), 3), ((6, 4), 3), ((3, 5), 2), ((9, 1), 4)])
def test_text_follows_behind_the_image_on_all_axes(grid, first):
    _, text = rope_table(AXES, grid, 4, CPU)
    assert_rotations(text, [(first + i,) * 3 for i in range(4)])


def test_it_is_a_rotation_of_neighbouring_pairs():
    image, _ = rope_table(AXES, (3, 4), 0, CPU)
    x = torch.randn(2, 12, 3, sum(AXES), generator=torch.Generator().manual_seed(0))
    turned = rotate(x, image)
    pairs, turned_pairs = x.unflatten(-1, (-1, 2)), turned.unflatten(-1, (-1, 2))
    torch.testing.assert_close(turned_pairs.norm(dim=-1), pairs.norm(dim=-1))
    one = torch.zeros(1, 12, 1, sum(AXES))
    one[..., 0::2] = 1.0  # (1, 0) becomes (cos, sin)
    angle = torch.tensor(
        [[cmath.phase(z) for z in rotation((0, r, c))] for r in (-2, -1, 0) for c in range(-2, 2)]
    )
    got = rotate(one, image)[0, :, 0]
    torch.testing.assert_close(got[:, 0::2], angle.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(got[:, 1::2], angle.sin(), rtol=0, atol=1e-6)
    assert rotate(x.bfloat16(), image).dtype == torch.bfloat16


def test_scores_depend_on_distances_alone():
    h, w = 5, 7
    image, text = rope_table(AXES, (h, w), 6, CPU)
    q, k = torch.randn(2, sum(AXES), generator=torch.Generator().manual_seed(1))

    def score(a, b):
        turn = [rotate(x.view(1, 1, 1, -1), row[None]).flatten() for x, row in ((q, a), (k, b))]
        return float(turn[0] @ turn[1])

    for dr, dc in ((0, 1), (2, 0), (1, 3)):
        same = [
            score(image[r * w + c], image[(r + dr) * w + c + dc])
            for r in range(h - dr)
            for c in range(w - dc)
        ]
        assert max(same) - min(same) < 1e-5
    same = [score(text[i], text[i + 2]) for i in range(4)]
    assert max(same) - min(same) < 1e-5
    assert math.isclose(score(image[8], image[8]), float(q @ k), abs_tol=1e-5)
    assert abs(score(image[0], image[1]) - score(image[0], image[2])) > 1e-3


def test_there_is_a_grid_for_every_bucket_and_resolution():
    at_1024 = {(h, w) for h, w in BUCKET_GRIDS if h * w > 3000}
    assert at_1024 == {(64, 64), (48, 84), (84, 48), (56, 74), (74, 56), (52, 78), (78, 52)}
    assert len(BUCKET_GRIDS) == 21


@pytest.mark.parametrize("grid", BUCKET_GRIDS + ODD_GRIDS, ids="{0[0]}x{0[1]}".format)
def test_every_shape_has_the_table_of_diffusers(grid):
    module = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
    theirs = module.NucleusMoEEmbedRope(theta=10000, axes_dim=list(PUBLISHED_AXES), scale_rope=True)
    image, text = rope_table(PUBLISHED_AXES, grid, TEXT_TOKENS, CPU)
    want_image, want_text = theirs((1, *grid), device=CPU, max_txt_seq_len=TEXT_TOKENS)
    assert torch.equal(image, want_image)
    assert torch.equal(text, want_text)


@pytest.mark.parametrize("grid", BUCKET_GRIDS + ODD_GRIDS, ids="{0[0]}x{0[1]}".format)
def test_relative_rotation_depends_on_differences_alone_in_every_shape(grid):
    """conj(R(a)) * R(b) is the rotation of b - a, which is written out: image to image, and image to text."""
    (h, w), generator = grid, torch.Generator().manual_seed(0)
    image, text = rope_table(PUBLISHED_AXES, grid, TEXT_TOKENS, CPU)
    a, b = torch.randint(h * w, (2, 200), generator=generator)
    place_a, place_b = (torch.stack([torch.zeros_like(i), i // w, i % w], dim=1) for i in (a, b))
    assert_turned_by(image[a].conj() * image[b], place_b - place_a)
    # Text token i stands at max(h//2, w//2) + i, image token (0, 0) at -ceil(h/2), -ceil(w/2).
    corner = torch.tensor([0, -(h - h // 2), -(w - w // 2)])
    i = torch.randint(TEXT_TOKENS, (200,), generator=generator)
    place_text = (max(h // 2, w // 2) + i)[:, None].expand(-1, 3)
    assert_turned_by(image[a].conj() * text[i], place_text - (place_a + corner))


def assert_turned_by(rotation, differences):
    """Both of [n, K/2]: an fp32 angle of up to 64 radians is good to 4e-6, and three of them meet here."""
    dims = torch.tensor(PUBLISHED_AXES).double()
    angles = [
        differences[:, axis, None].double() * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
        for axis, dim in enumerate(dims.tolist())
    ]
    angle = torch.cat(angles, dim=1)
    want = torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotation.to(torch.complex128), want, rtol=0, atol=3e-5)
