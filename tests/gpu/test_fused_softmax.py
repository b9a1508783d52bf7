"""The fused softmax, its naive twin, and the attention made of it, against plain torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from batchinfer.ops import fused_softmax_attention, reference_attention
from batchinfer.ops.compiled import load_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = [(F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16)]
LENGTHS = [1, 7, 256, 504, 1000, 2048, 4096, 8192, 16384, 20000, 20001]


def softmaxes(scores: Tensor, ends: Tensor | None, window: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the fused kernel and of the naive one, over poisoned outputs."""
    load_kernels()
    made = []
    for op in (torch.ops.batchinfer.fused_softmax, torch.ops.batchinfer.fused_softmax_naive):
        made.append(torch.full(scores.shape, math.nan, dtype=dtype, device="cuda"))
        op(made[-1], scores, 0.3, ends, window)
    return made


@pytest.mark.parametrize(("of_scores", "of_probs"), PAIRS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [None, 300])
def test_fused_softmax(of_scores: torch.dtype, of_probs: torch.dtype, length: int, window: int | None) -> None:
    rng = torch.Generator().manual_seed(length)
    scores = (8 * torch.randn(2, 3, 5, length, generator=rng)).to(of_scores).cuda()
    ends = torch.randint(length + 1, (2, 5), generator=rng).int()
    ends[0, 0], ends[1, 4] = 0, length
    ends = ends.cuda()
    columns = torch.arange(length, device="cuda")
    hidden = columns >= ends[:, None, :, None]
    if window is not None:
        hidden |= columns < ends[:, None, :, None] - window
    expected = fused_softmax_attention._softmax(scores.double(), 0.3, ends, window)
    scores = scores.masked_fill(hidden, math.nan)
    eps = torch.finfo(of_probs).eps
    for y in softmaxes(scores, ends, window or 0, of_probs):
        torch.testing.assert_close(y.double(), expected, rtol=max(2 * eps, 3e-5), atol=1e-7)
        assert not y[hidden.expand_as(y)].any()
    if of_scores == of_probs:
        torch.ops.batchinfer.fused_softmax(scores, scores, 0.3, ends, window or 0)
        torch.testing.assert_close(scores.double(), expected, rtol=max(2 * eps, 3e-5), atol=1e-7)


@pytest.mark.parametrize("length", [24, 1001])
def test_without_ends_queries_are_the_newest(length: int) -> None:
    scores = torch.randn(1, 2, 9, length, generator=torch.Generator().manual_seed(0)).cuda()
    expected = fused_softmax_attention._softmax(scores.double(), 0.3, None, None)
    for y in softmaxes(scores, None, 0, F32):
        torch.testing.assert_close(y.double(), expected, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("length", [24, 1000, 4096, 1001, 20000])
def test_scores_without_bounds(length: int) -> None:
    """-inf is never likely, even where a thread has nothing else; NaN spoils its row and no other."""
    scores = torch.randn(1, 1, 4, length, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 0, : length - 1], scores[0, 0, 1, length // 2], scores[0, 0, 3] = -math.inf, math.nan, -math.inf
    ends = torch.full((1, 4), length, dtype=torch.int32, device="cuda")
    y = softmaxes(scores.cuda(), ends, 0, F32)[0].cpu()
    expected = (scores * 0.3).softmax(-1)
    torch.testing.assert_close(y, expected, rtol=3e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, F16, BF16, torch.float64])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("counts_contexts", [([1] * 9, [1, 17, 300, 64, 2, 800, 5, 90, 33]), ([70, 1, 33, 2], [70, 401, 250, 2])])
def test_paged_attention(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, counts_contexts: tuple[list[int], list[int]]
) -> None:
    counts, contexts = counts_contexts
    rng = torch.Generator().manual_seed(1)
    begins = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(sum(counts), heads, 64, generator=rng).to(dtype).cuda()
    cache = torch.randn(2, 600, kv_heads, 16, 64, generator=rng).to(dtype).cuda().transpose(2, 3)
    tables = torch.randperm(600, generator=rng).int()[: 60 * len(counts)].view(len(counts), 60)
    own = torch.zeros(600 * 16, dtype=torch.bool)
    for table, context in zip(tables, contexts, strict=True):
        own[[int(table[j // 16]) * 16 + j % 16 for j in range(context)]] = True
    tensors = (tables.cuda(), begins.cuda(), torch.tensor(contexts, dtype=torch.int32).cuda())
    exact = reference_attention.paged_attention(q.double(), *cache.double(), *tensors, 0.125, window)
    poisoned = cache.masked_fill(~own.view(600, 16, 1, 1).cuda(), math.nan)
    y = fused_softmax_attention.paged_attention(q, poisoned[0], poisoned[1], *tensors, 0.125, window)
    limit = {torch.float64: 1e-12, F32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert float((y.double() - exact).norm() / exact.norm()) < limit
