"""Checks of pairs: bit counts and cosines against plain references, in chunks of any size."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_nucleus.data.curation.near_duplicates import verify
from megatron_nucleus.data.curation.near_duplicates.verify import cosine_check, hash_check
from megatron_nucleus.utils.errors import ConfigError, DataError


def some_pairs(rows: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.random.default_rng(seed).integers(0, rows, (2, count), np.int32))


@pytest.fixture(params=[None, 1, 1000], ids=["one chunk", "a pair a chunk", "some pairs a chunk"])
def chunks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(verify, "_CHUNK_BYTES", request.param)


def test_hashes_hold_up_to_the_limit_and_no_further(chunks):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 4, np.int64).tobytes()
    flips = np.zeros((101, 256), np.uint8)
    for row in range(101):
        flips[row, rng.choice(256, row, replace=False)] = 1
    hashes = np.frombuffer(base, np.uint8) ^ np.packbits(flips, axis=1)
    rows = np.arange(101, dtype=np.int32)
    assert hash_check(hashes)(np.zeros_like(rows), rows).tolist() == [row <= 31 for row in range(101)]
    assert hash_check(hashes, 60)(rows, np.zeros_like(rows)).tolist() == [row <= 60 for row in range(101)]


def test_hashes_are_counted_as_whole_numbers_would_be(chunks, tmp_path):
    hashes = np.random.default_rng(1).integers(0, 256, (50, 32), np.uint8)
    hashes.tofile(tmp_path / "hashes")
    mapped = np.memmap(tmp_path / "hashes", np.uint8, "r", shape=(50, 32))
    a, b = some_pairs(50, 300, seed=2)
    numbers = [int.from_bytes(h.tobytes(), "big") for h in hashes]
    expected = [(numbers[i] ^ numbers[j]).bit_count() <= 128 for i, j in zip(a, b, strict=True)]
    assert hash_check(mapped, 128)(a, b).tolist() == expected
    assert 0 < sum(expected) < 300


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_cosines_are_those_of_double_precision(dtype, scale, chunks):
    """Also where squares would leave the range of half precision."""
    rng = np.random.default_rng(3)
    embeddings = (rng.normal(size=(40, 24)) + rng.normal(size=24)).astype(np.float32) * scale
    embeddings = embeddings.astype(dtype)
    wide = embeddings.astype(np.float64)
    a, b = some_pairs(40, 400, seed=4)
    cosine = (wide[a] * wide[b]).sum(1) / np.linalg.norm(wide[a], axis=1) / np.linalg.norm(wide[b], axis=1)
    clear = np.abs(cosine - 0.5) > 1e-5
    holds = cosine_check(embeddings, 0.5)(a, b)
    np.testing.assert_array_equal(holds[clear], cosine[clear] >= 0.5)
    assert 0 < holds.sum() < 400


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_embedding_without_direction_is_named(bad):
    embeddings = np.ones((5, 3), np.float32)
    embeddings[3] = bad
    check = cosine_check(embeddings, 0.5)
    assert check(np.array([0, 1]), np.array([2, 4])).tolist() == [True, True]
    with pytest.raises(DataError, match="embedding of row 3 is zero or not finite"):
        check(np.array([0, 1]), np.array([2, 3]))


def test_no_pairs():
    nothing = np.zeros(0, np.int32)
    assert hash_check(np.zeros((3, 32), np.uint8))(nothing, nothing).tolist() == []
    assert cosine_check(np.ones((3, 8), np.float32), 0.9)(nothing, nothing).tolist() == []


def test_other_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"hash_check: hashes are uint64 \[3\], not uint8"):
        hash_check(np.zeros(3, np.uint64))
    with pytest.raises(ConfigError, match="max_bits 257: must be 0 to 256"):
        hash_check(np.zeros((3, 32), np.uint8), 257)
    with pytest.raises(ConfigError, match=r"embeddings are float64 \[3, 2\], not float16 or float32"):
        cosine_check(np.zeros((3, 2)), 0.5)
    for cosine in (1.5, float("nan")):
        with pytest.raises(ConfigError, match=f"min_cosine {cosine}: must be -1 to 1"):
            cosine_check(np.zeros((3, 2), np.float32), cosine)
