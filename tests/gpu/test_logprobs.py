"""Log-probabilities from the kernel against the reference in float64; ranks and ids are the same ones, ties included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchinfer.ops import reference_logprobs
from batchinfer.ops.logprobs import log_probabilities
from tests.gpu.test_sampling import INF, NAN, PAIRS, SPLITS, logits_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def assert_told(logits: Tensor, k: int, splits: int = 0) -> None:
    random = torch.Generator("cuda").manual_seed(k)
    chosen = torch.randint(0, logits.shape[1], (len(logits),), generator=random, device="cuda")
    chosen[::2] = logits[::2].argmax(-1)
    ours, theirs = log_probabilities(logits, chosen, k, splits), reference_logprobs.log_probabilities(logits.double(), chosen, k)
    assert torch.equal(ours.ranks, theirs.ranks)
    assert torch.equal(ours.top_ids, theirs.top_ids)
    for mine, wanted in ((ours.chosen, theirs.chosen), (ours.top, theirs.top)):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-6, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize(("dtype", "splits"), PAIRS, ids=str)
@pytest.mark.parametrize("k", [0, 1, 5, 20, 1024])
def test_told_as_by_the_reference(k: int, dtype: torch.dtype, splits: int) -> None:
    for vocab_size, rows, pad in ((1, 3, 0), (17, 9, 0), (1000, 33, 3), (32000, 40, 8), (128256, 3, 0)):
        assert_told(logits_of(rows, vocab_size, dtype, 1, pad), k, splits)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("k", [1, 7, 300])
def test_of_equals_the_lower_ids_come_first(k: int, splits: int) -> None:
    for levels in (1, 2, 9):
        assert_told(torch.randint(-levels, levels, (20, 5000), device="cuda").bfloat16() * 0.0625, k, splits)


def test_rows_without_numbers() -> None:
    logits = logits_of(8, 3000, torch.float32)
    plain = log_probabilities(logits, torch.arange(8, device="cuda"), 5)
    logits[1], logits[2, 7], logits[3, 9] = -INF, NAN, INF
    logits[4, 100:] = -INF
    told = log_probabilities(logits, torch.arange(8, device="cuda"), 5)
    assert told.chosen[1:4].isnan().all() and told.top[1:4].isnan().all()
    for part, whole in zip(told, plain, strict=True):
        assert torch.equal(part[[0, 5, 6, 7]], whole[[0, 5, 6, 7]])
    assert_told(logits[4:5], 200)


def test_nothing_waits_and_a_graph_replays() -> None:
    logits, chosen = logits_of(20, 32000), torch.arange(20, device="cuda")
    log_probabilities(logits, chosen, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        told = log_probabilities(logits, chosen, 5)
    logits.copy_(logits_of(20, 32000, seed=9))
    for tensor in told:
        tensor.fill_(-1)
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        anew = log_probabilities(logits, chosen, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(told, anew, strict=True))
