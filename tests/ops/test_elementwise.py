"""Embedding and fed tokens of the reference, and that the memory-bound ops fall back to it where no kernel runs."""

from __future__ import annotations

import torch

from batchinfer.ops import elementwise, reference


def test_embedding_of_a_part_of_the_vocabulary():
    weight = torch.randn(5, 3, dtype=torch.float64)
    ids = torch.tensor([0, 9, 10, 14, 15, 12], dtype=torch.int32)
    rows = reference.embedding(ids, weight, 10, 15)
    assert torch.equal(rows[[2, 3, 5]], weight[[0, 4, 2]])
    assert not rows[[0, 1, 4]].any()
    assert torch.equal(reference.embedding(ids, weight, 10), rows)
    assert torch.equal(reference.embedding(ids[:1], weight), weight[:1])


def test_fed_tokens_are_resolved_and_stored():
    last, cache = torch.tensor([70, 71, 72], dtype=torch.int32), torch.full((9,), 5, dtype=torch.int32)
    ids, slots = torch.tensor([3, -1, 4, -3], dtype=torch.int32), torch.tensor([2, 7, -1, 0], dtype=torch.int32)
    assert reference.feed_tokens(ids, last, slots, cache).tolist() == [3, 70, 4, 72]
    assert cache[:8].tolist() == [72, 5, 3, 5, 5, 5, 5, 70]


def test_on_a_cpu_they_are_the_reference():
    x, residual, weight = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    for ours, theirs in zip(
        elementwise.rms_norm(x, weight, 1e-5, residual), reference.rms_norm(x, weight, 1e-5, residual), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(elementwise.silu_and_mul(x), reference.silu_and_mul(x))
    ids = torch.tensor([1, 0], dtype=torch.int32)
    assert torch.equal(elementwise.embedding(ids, x), x[[1, 0]])
    cache = torch.zeros(3, dtype=torch.int32)
    assert elementwise.feed_tokens(ids, ids, ids, cache).tolist() == [1, 0]
