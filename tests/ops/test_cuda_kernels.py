"""The kernels of csrc/cuda on a CPU: their own source, its threads as coroutines (cuda_on_cpu.h). No GPU is needed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a weight or a gradient against fp64: some roundings to the dtype.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
compiler = shutil.which("g++")

pytestmark = pytest.mark.skipif(compiler is None, reason="needs g++ to compile the kernels for a CPU")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("cuda") / "cuda_on_cpu.so"
    include = Path(torch.__file__).parent / "include"
    source = ROOT / "tests" / "ops" / "cuda_launches.cpp"
    folders = (include, ROOT / "csrc" / "cuda", source.parent)
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        *(f"-I{f}" for f in folders),
        source,
        "-o",
        built,
    ]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(built))


def p(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


class Chosen:
    """What the forward kernels make of [B, S, E] logits, and the gradient from their results."""

    def __init__(
        self, library, logits: Tensor, capacity: int, use_sigmoid: bool, scale: float, shared: bool = True
    ):
        self.library, self.logits = library, logits
        B, S, E = logits.shape
        self.args = (use_sigmoid, ctypes.c_float(scale))
        self.sizes = (ctypes.c_int64(B), S, E, capacity)
        self.type = DTYPES.index(logits.dtype)
        sorted_ = 1 << (capacity - 1).bit_length()
        self.index = torch.full((B, E, capacity), -1)
        self.weight, self.won = logits.new_full((2, B, E, capacity), torch.nan)
        self.cut = torch.full((B, E, 2), -1, dtype=torch.int32)
        self.total, self.score = logits.new_full((B, S), torch.nan), logits.new_full((B, E, S), torch.nan)
        scratch = None if shared else torch.empty(B * E, sorted_, dtype=torch.int64)
        library.expert_choice(
            self.type, p(logits), p(self.index), p(self.weight), p(self.cut), p(self.total), p(self.score), p(self.won),
            p(scratch), *self.sizes, sorted_, *self.args,
        )  # fmt: skip

    def gradient(self, grad: Tensor) -> Tensor:
        out = torch.full_like(self.logits, torch.nan)
        spread = torch.zeros(self.score.shape)
        self.library.expert_choice_backward(
            self.type, p(grad), p(self.logits), p(self.index), p(self.cut), p(self.total), p(spread), p(out),
            *self.sizes, *self.args,
        )  # fmt: skip
        return out


def scores_of(logits: Tensor, use_sigmoid: bool) -> Tensor:
    return (logits.sigmoid() if use_sigmoid else logits.softmax(-1)).transpose(1, 2)


def weights_of(logits: Tensor, index: Tensor, use_sigmoid: bool, scale: float) -> Tensor:
    """The weights of given choices, in the dtype of the logits."""
    score = scores_of(logits, use_sigmoid)
    won = score.gather(2, index)
    total = (
        torch.zeros_like(score).scatter(2, index, won).sum(1, keepdim=True).expand_as(score).gather(2, index)
    )
    return won / (total + 1e-12) * scale


CASES = [
    (1, 1, 1, 1),
    (2, 16, 4, 8),
    (2, 33, 3, 33),
    (1, 300, 70, 5),
    (1, 65, 256, 1),
    (3, 31, 33, 7),
    (1, 700, 2, 513),
]


@pytest.mark.parametrize("use_sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_choice_weights_and_gradient(library, case, dtype, use_sigmoid):
    B, S, E, capacity = case
    generator = torch.Generator().manual_seed(S)
    logits = (3 * torch.randn(B, S, E, generator=generator)).to(dtype)
    chosen = Chosen(library, logits, capacity, use_sigmoid, 2.5)

    exact = logits.double().requires_grad_()
    torch.testing.assert_close(
        chosen.score, scores_of(exact, use_sigmoid).to(dtype), rtol=LIMITS[dtype], atol=1e-7
    )
    order = chosen.score.float().sort(dim=2, descending=True, stable=True).indices  # ties: the earlier token
    assert torch.equal(chosen.index, order[:, :, :capacity])

    weights = weights_of(exact, chosen.index, use_sigmoid, 2.5)
    torch.testing.assert_close(chosen.weight.double(), weights, rtol=LIMITS[dtype], atol=LIMITS[dtype])
    grad = torch.randn(weights.shape, generator=generator).to(dtype)
    (expected,) = torch.autograd.grad(weights, exact, grad.double())
    got = chosen.gradient(grad).double()
    assert (got - expected).abs().max() <= LIMITS[dtype] * max(1.0, expected.abs().max())


def test_ties_go_to_the_earlier_token_and_every_row_fills_up(library):
    logits = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 1.0]).view(1, 7, 1).expand(2, 7, 3).contiguous()
    chosen = Chosen(library, logits, 4, True, 1.0)
    assert chosen.index.tolist() == [[[1, 3, 0, 2]] * 3] * 2
    torch.testing.assert_close(chosen.weight, torch.full((2, 3, 4), 1 / 3))


def test_many_tokens_at_the_threshold_across_chunks(library):
    """All of 700 tokens tie, so that the cut falls into the third chunk of 256."""
    chosen = Chosen(library, torch.zeros(1, 700, 2), 600, False, 1.0)
    assert torch.equal(chosen.index[0, 0], torch.arange(600))
    assert chosen.cut[0, :, 1].tolist() == [599, 599]


def test_a_nan_is_chosen_first_and_stays(library):
    """So that a damaged token is seen in the loss, as with torch.topk."""
    logits = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(0))
    logits[0, 4, 1] = torch.nan
    chosen = Chosen(library, logits, 2, False, 1.0)
    assert chosen.index[0, :, 0].tolist() == [4, 4]
    assert chosen.weight[0, :, 0].isnan().all()
    assert not chosen.weight[0, :, 1].isnan().any()


def test_sorting_in_global_memory_gives_the_same_bits(library):
    logits = torch.randn(2, 90, 3, generator=torch.Generator().manual_seed(1))
    a, b = (Chosen(library, logits, 70, False, 2.5, shared=s) for s in (True, False))
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.weight, b.weight)


def table(tensors: list[Tensor]) -> tuple:
    data = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    return data, (ctypes.c_int64 * len(tensors))(*(t.numel() for t in tensors)), len(tensors)


def tensors_of(dtype: torch.dtype) -> list[Tensor]:
    """Sizes about the kernels' chunk of 65,536 and packs of 16 bytes; some do not begin at a multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(2)
    sizes = (1, 7, 65535, 65536, 65537, 3, 200_001)
    return [torch.randn(n + i % 2, generator=generator).to(dtype)[i % 2 :] for i, n in enumerate(sizes)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_square_sum(library, dtype):
    tensors = tensors_of(dtype)
    partial, out = torch.full((64,), torch.nan, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    library.square_sum(DTYPES.index(dtype), *table(tensors), p(partial), p(out))
    expected = sum(t.double().square().sum().item() for t in tensors)
    assert out.item() == pytest.approx(expected, rel=1e-12)


def test_squares_beyond_float32_do_not_overflow(library):
    partial, out = torch.zeros(64, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    tensors = [torch.full((3,), 1e30)]
    library.square_sum(0, *table(tensors), p(partial), p(out))
    assert out.item() == pytest.approx(3e60, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_rounds_once_and_a_factor_of_one_changes_nothing(library, dtype):
    tensors = tensors_of(dtype)
    before = [t.clone() for t in tensors]
    for factor in (torch.tensor(1.0), torch.tensor(0.3)):
        library.scale_tensors(DTYPES.index(dtype), *table(tensors), p(factor))
        wanted = [(t.float() * factor).to(dtype) for t in before]
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_scores_that_vanish_in_half_precision_weigh_nothing(library):
    """And are no NaN: 1e-12 is 0 there. Experts 1 and 2 take tokens whose scores for them are 0."""
    logits = torch.tensor([[[20.0, -20.0, -20.0]]]).half()
    chosen = Chosen(library, logits.expand(1, 4, 3).contiguous(), 1, True, 1.0)
    assert chosen.weight.flatten().tolist() == [1.0, 0.0, 0.0]
    lonely = Chosen(library, torch.full((1, 1, 2), -20.0).half(), 1, True, 1.0)
    assert lonely.weight.tolist() == [[[0.0], [0.0]]]
    assert not lonely.gradient(torch.ones_like(lonely.weight)).isnan().any()
