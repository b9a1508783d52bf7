"""What may be drawn from a batch's logits, against a plain twin that looks at each row's own parameters."""

from __future__ import annotations

import pytest
import torch

from batchinfer import ops
from batchinfer.engine.batch import Batch, BatchBuilder
from batchinfer.engine.sampler import sample_tokens
from batchinfer.engine.scheduler import ScheduledBatch
from batchinfer.engine.sequence import Request, SamplingParams, Sequence
from tests.engine.plain_sampling import SamplingRow, plain_sample_tokens

CPU = torch.device("cpu")
EOS = frozenset({2})


def batch_of(rows: list[SamplingRow]) -> Batch:
    """The batch in which every row prefills `position` tokens and draws its first one."""
    builder = BatchBuilder(len(rows), 1, 4, EOS)
    sequences = [
        Sequence.from_request(Request(i, [3] * row.position, row.params, row.seed), 0.0, 100) for i, row in enumerate(rows)
    ]
    for seq in sequences:
        seq.block_table = [seq.request.request_id]
    return builder.build(ScheduledBatch(sequences, [row.position for row in rows]))


def draw(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    batch = batch_of(rows)
    return sample_tokens(logits.clone(), batch, batch.to_tensors(CPU)).tolist()


def test_draws_equal_the_plain_twin() -> None:
    rows = []
    for i in range(40):
        mixed = {"temperature": (i % 3) * 0.7, "top_p": 1 - 0.02 * i, "top_k": i % 5 * 7, "min_p": i % 4 * 0.05}
        params = SamplingParams(**mixed, min_tokens=i % 2, stop_token_ids=(i, 1000))
        rows.append(SamplingRow(params, seed=(i * 0x9E3779B97F4A7C15) % 2**64, position=i % 4 + 1, num_completion_tokens=0))
    logits = torch.randn(40, 301, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = 9.0
    assert draw(logits, rows) == plain_sample_tokens(logits.clone(), rows, EOS).tolist()


def test_a_row_draws_alone_what_it_draws_among_others() -> None:
    logits = torch.randn(4, 301, generator=torch.Generator().manual_seed(0))
    kinds = [SamplingParams(), SamplingParams(1.0), SamplingParams(0.7, top_k=9), SamplingParams(2.0, top_p=0.8, min_p=0.01)]
    rows = [SamplingRow(params, 2**64 - 1 - i, 1 + i % 4, 0) for i, params in enumerate(kinds)]
    assert draw(logits, rows) == [draw(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]


@pytest.mark.parametrize(("min_tokens", "ignore_eos", "expected"), [(0, False, 2), (1, False, 0), (1, True, 2)])
def test_the_end_waits_for_min_tokens(min_tokens: int, ignore_eos: bool, expected: int) -> None:
    """EOS (2) is the likeliest token and 1, a stop token id, the next one."""
    params = SamplingParams(min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=(1, 99))
    assert draw(torch.tensor([[0.0, 1.0, 2.0]]), [SamplingRow(params, 0, 1, 0)]) == [expected]


def test_greedy_batches_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "sample", None)
    logits = torch.randn(3, 7)
    rows = [SamplingRow(SamplingParams(), seed, 1, 0) for seed in range(3)]
    assert draw(logits, rows) == logits.argmax(-1).tolist()
