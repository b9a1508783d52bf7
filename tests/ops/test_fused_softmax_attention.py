"""The attention backend of the fused softmax, with the softmax's twin: on a CPU, against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from batchinfer.ops import reference_attention
from batchinfer.ops.fused_softmax_attention import fused_softmax, paged_attention
from tests.ops.test_reference import BATCHES, _strided


@pytest.mark.parametrize("temporary_bytes", [2**28, 2000])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("batch", BATCHES)
def test_it_is_the_reference_attention(monkeypatch, batch, heads, kv_heads, window, temporary_bytes):
    monkeypatch.setattr(reference_attention, "TEMPORARY_BYTES", temporary_bytes)
    counts, contexts = BATCHES[batch]
    begins = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    q, cache = _strided(sum(counts), heads, 10), _strided(2, 40, 4, kv_heads, 10, seed=1)
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(2)).int()[: 8 * len(counts)].view(len(counts), 8)
    arguments = (q, cache[0], cache[1], tables, begins, torch.tensor(contexts, dtype=torch.int32), 0.3, window)
    expected = reference_attention.paged_attention(*arguments)
    torch.testing.assert_close(paged_attention(*arguments), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_and_the_layout_of_the_engine(dtype):
    """The cache is a view of [blocks, K, block_size, D]."""
    q, cache = _strided(8, 4, 16, dtype=dtype), _strided(2, 13, 2, 4, 16, dtype=dtype, seed=1).contiguous().transpose(2, 3)
    tables = torch.arange(18, dtype=torch.int32).remainder(13).view(3, 6)
    begins, contexts = torch.tensor([0, 1, 7, 8], dtype=torch.int32), torch.tensor([23, 6, 2], dtype=torch.int32)
    y = paged_attention(q, cache[0], cache[1], tables, begins, contexts, 0.3)
    exact = reference_attention.paged_attention(q.double(), *cache.double(), tables, begins, contexts, 0.3)
    assert y.dtype == dtype
    assert float((y.double() - exact).norm() / exact.norm()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("window", [None, 6])
def test_it_reads_nothing_of_others(window):
    begins, contexts = torch.tensor([0, 1, 7, 8], dtype=torch.int32), torch.tensor([23, 6, 2], dtype=torch.int32)
    tables = torch.tensor([[9, 3, 8, 1, 12, 7], [2, 5, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]], dtype=torch.int32)
    q, cache = _strided(8, 4, 10), _strided(2, 13, 4, 2, 10, seed=1)
    y = paged_attention(q, cache[0], cache[1], tables, begins, contexts, 0.3, window)
    own = torch.zeros(13 * 4, dtype=torch.bool)
    for table, context in zip(tables, contexts.tolist(), strict=True):
        own[[int(table[j // 4]) * 4 + j % 4 for j in range(context)]] = True
    poisoned = cache.masked_fill(~own.view(13, 4, 1, 1), math.nan)
    assert torch.equal(paged_attention(q, poisoned[0], poisoned[1], tables, begins, contexts, 0.3, window), y)


def test_a_sequence_that_overflows_spoils_no_other():
    begins, contexts = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([7, 7], dtype=torch.int32)
    tables = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    q, cache = _strided(2, 2, 8), _strided(2, 4, 4, 1, 8, seed=1)
    y = paged_attention(q, cache[0], cache[1], tables, begins, contexts, 0.3)
    cache[:, 1] = math.inf
    spoilt = paged_attention(q, cache[0], cache[1], tables, begins, contexts, 0.3)
    assert torch.equal(spoilt[1], y[1]) and bool(spoilt[0].isnan().all())


def test_softmax_of_rows_that_see_nothing_or_nan():
    scores = torch.randn(2, 3, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[0, 1, 5, 10], [3, 0, 9, 10]], dtype=torch.int32)
    for window in (None, 2):
        poisoned = scores.clone()
        expected = torch.zeros_like(scores)
        for b in range(2):
            for q in range(4):
                end, begin = int(ends[b, q]), 0 if window is None else max(0, int(ends[b, q]) - window)
                expected[b, :, q, begin:end] = (scores[b, :, q, begin:end] * 0.7).softmax(-1)
                poisoned[b, :, q, :begin] = poisoned[b, :, q, end:] = math.nan
        y = fused_softmax(poisoned, 0.7, ends, window, torch.float64)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


def test_without_ends_queries_are_the_newest():
    scores = torch.randn(1, 2, 3, 7, generator=torch.Generator().manual_seed(0))
    y = fused_softmax(scores, 1.0, None, None, torch.float32)
    assert torch.equal(y, fused_softmax(scores, 1.0, torch.tensor([[5, 6, 7]], dtype=torch.int32), None, torch.float32))
