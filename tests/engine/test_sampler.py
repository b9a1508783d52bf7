"""The policy around drawing: early stops are forbidden, greedy stays an argmax, seeds keep all 64 bits."""

from __future__ import annotations

import torch

from batchinfer import ops
from batchinfer.engine.sampler import SamplingRow, as_signed, sample_tokens
from batchinfer.engine.sequence import SamplingParams

EOS = frozenset({4})


def test_stops_wait_for_min_tokens():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    params = SamplingParams(min_tokens=2, stop_token_ids=(3, 99))

    def drawn(num_completion_tokens: int, params: SamplingParams = params) -> int:
        return int(sample_tokens(logits.clone(), [SamplingRow(params, 0, 10, num_completion_tokens)], EOS))

    assert [drawn(0), drawn(1), drawn(2)] == [2, 2, 4]
    assert drawn(0, SamplingParams(min_tokens=2, ignore_eos=True)) == 4


def test_greedy_batches_draw_nothing(monkeypatch):
    monkeypatch.setattr(ops, "sample", None)
    logits = torch.randn(3, 7)
    rows = [SamplingRow(SamplingParams(), seed, 0, 0) for seed in range(3)]
    assert torch.equal(sample_tokens(logits, rows, EOS), logits.argmax(-1))


def test_mixed_batches_draw_as_each_row_alone():
    logits = torch.randn(4, 301, generator=torch.Generator().manual_seed(0))
    kinds = [SamplingParams(), SamplingParams(1.0), SamplingParams(0.7, top_k=9), SamplingParams(2.0, top_p=0.8, min_p=0.01)]
    rows = [SamplingRow(params, 2**64 - 1 - i, 100 + i, 3) for i, params in enumerate(kinds)]
    together = sample_tokens(logits.clone(), rows, EOS).tolist()
    assert together == [int(sample_tokens(logits[i : i + 1].clone(), [row], EOS)) for i, row in enumerate(rows)]


def test_seeds_keep_their_bits():
    assert [as_signed(seed) for seed in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]
