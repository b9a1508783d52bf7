"""Log-probabilities against torch's log_softmax, and ranks and likeliest tokens against a plain sort."""

from __future__ import annotations

import pytest
import torch

from batchinfer.ops import LogProbabilities, log_probabilities, reference_logprobs
from batchinfer.ops.reference_logprobs import likeliest


def _logits(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 900).to(dtype)


def _order(row: list[float]) -> list[int]:
    """Token ids from the likeliest on, of equals the lower first."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


def _check(found: LogProbabilities, logits: torch.Tensor, tokens: torch.Tensor, k: int, tolerance: float) -> None:
    expected = torch.log_softmax(logits.double(), -1)
    orders = [_order(row) for row in logits.tolist()]
    assert found.top_ids.tolist() == [order[:k] for order in orders]
    assert found.ranks.tolist() == [order.index(token) + 1 for order, token in zip(orders, tokens.tolist(), strict=True)]
    for values, ids in ((found.chosen, tokens[:, None]), (found.top, found.top_ids)):
        wanted = expected.gather(1, ids)
        torch.testing.assert_close(values.double().reshape(wanted.shape), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("chunk_elements", [2**23, 150])
@pytest.mark.parametrize("k", [0, 1, 5, 71, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 5e-6), (torch.float16, 5e-6)]
)
def test_equal_log_softmax(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, k: int, chunk_elements: int
) -> None:
    """The half types hold many equals here, so ties are met everywhere. More than the vocabulary cannot be told."""
    monkeypatch.setattr(reference_logprobs, "CHUNK_ELEMENTS", chunk_elements)
    logits, tokens = _logits(13, 71, dtype=dtype), torch.arange(13) * 5
    found = log_probabilities(logits, tokens, k)
    assert found.top.dtype == found.chosen.dtype == (dtype if dtype == torch.float64 else torch.float32)
    _check(found, logits, tokens, min(k, 71), tolerance)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 8])
def test_ties_go_to_the_lower_id(k: int) -> None:
    rows = [[1.0, 3.0, 1.0, 3.0, 3.0, 0.0, 1.0, 1.0], [2.0] * 8, [-torch.inf, 1.0, *[-torch.inf] * 6]]
    logits = torch.tensor(rows)
    assert likeliest(logits, k).tolist() == [_order(row)[:k] for row in rows]
    assert log_probabilities(logits, logits.argmax(-1), k).ranks.tolist() == [1, 1, 1]


def test_a_row_with_nan_spoils_no_other() -> None:
    logits = _logits(3, 20)
    alone = log_probabilities(logits[[0, 2]], torch.tensor([4, 5]), 3)
    logits[1, 7] = torch.nan
    beside = log_probabilities(logits, torch.tensor([4, 7, 5]), 3)
    assert beside.chosen[1].isnan()
    for lonely, one in zip(alone, beside, strict=True):
        assert torch.equal(lonely, one[[0, 2]])


def test_no_temporary_is_as_large_as_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = reference_logprobs._of_chunk
    monkeypatch.setattr(reference_logprobs, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(reference_logprobs, "_of_chunk", lambda logits, *rest: sizes.append(len(logits)) or whole(logits, *rest))
    log_probabilities(_logits(25, 100), torch.zeros(25, dtype=torch.int64), 2)
    assert sizes == [10, 10, 5]
