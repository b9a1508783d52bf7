"""Penalties against transformers and against a formula for one token at a time, masks against a loop; other rows untouched."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from batchinfer.ops import apply_penalties, apply_token_bitmask, reference_penalties

BLOCK_SIZE, VOCAB = 4, 61


@dataclass
class Row:
    prompt: list[int]
    completion: list[int]
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


def penalise(logits: torch.Tensor, rows: list[Row], only: list[int] | None = None) -> torch.Tensor:
    """Lays the rows' tokens into shuffled blocks of a cache full of other tokens, in another order than the logits'."""
    rng = random.Random(5)
    lengths = [len(row.prompt) + len(row.completion) for row in rows]
    width = max(-(-length // BLOCK_SIZE) for length in lengths)
    others = torch.Generator().manual_seed(6)
    cache = torch.randint(0, VOCAB, (len(rows) * width, BLOCK_SIZE), dtype=torch.int32, generator=others)
    seqs = rng.sample(range(len(rows)), len(rows))  # of each row of the logits
    tables, context_lens = torch.zeros(len(rows), width, dtype=torch.int32), torch.zeros(len(rows), dtype=torch.int32)
    blocks = iter(rng.sample(range(len(cache)), len(cache)))
    for row, seq, length in zip(rows, seqs, lengths, strict=True):
        context_lens[seq] = length
        for i, token in enumerate(row.prompt + row.completion):
            if i % BLOCK_SIZE == 0:
                tables[seq, i // BLOCK_SIZE] = next(blocks)
            cache[tables[seq, i // BLOCK_SIZE], i % BLOCK_SIZE] = token

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)

    chosen = torch.tensor(range(len(rows)) if only is None else only, dtype=torch.int64)
    prompt_lens = torch.tensor([len(row.prompt) for row in rows], dtype=torch.int32)
    order = torch.tensor(seqs, dtype=torch.int32)
    result = logits.clone()
    parameters = (column("repetition"), column("presence"), column("frequency"))
    apply_penalties(result, chosen, cache, tables, context_lens, order, prompt_lens, *parameters)
    return result


def random_rows(count: int, seed: int) -> list[Row]:
    """Ragged lengths, few different tokens, so that many come again."""
    rng = random.Random(seed)
    some = [rng.randrange(VOCAB) for _ in range(9)]
    return [
        Row(
            rng.choices(some, k=rng.randint(1, 11)),
            rng.choices(some, k=rng.randint(0, 13)),
            rng.choice((1.0, 1.3, 0.7)),
            rng.choice((0.0, 0.6, -0.4)),
            rng.choice((0.0, 0.25, -0.1)),
        )
        for _ in range(count)
    ]


def noise(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3).to(dtype)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.5, 40.0])
def test_repetition_equals_transformers(penalty: float) -> None:
    rows, logits = random_rows(7, seed=0), noise(7)
    for row in rows:
        row.repetition, row.presence, row.frequency = penalty, 0.0, 0.0
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = [
        processor(torch.tensor([row.prompt + row.completion]), one[None])[0] for row, one in zip(rows, logits, strict=True)
    ]
    assert torch.equal(penalise(logits, rows), torch.stack(expected))


@pytest.mark.parametrize("chunk_elements", [2**23, 100])
def test_all_penalties_equal_a_formula(monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(reference_penalties, "CHUNK_ELEMENTS", chunk_elements)
    rows, logits = random_rows(40, seed=1), noise(40)
    result = penalise(logits, rows)
    for row, before, after in zip(rows, logits.tolist(), result.tolist(), strict=True):
        counts = Counter(row.completion)
        for token, logit in enumerate(before):
            if token in row.prompt or token in row.completion:
                logit = logit / row.repetition if logit > 0 else logit * row.repetition
            if counts[token]:
                logit -= counts[token] * row.frequency + row.presence
            assert after[token] == pytest.approx(logit, abs=1e-12)


def test_only_the_rows_named_change_and_neutral_ones_not_by_a_bit() -> None:
    rows, logits = random_rows(9, seed=2), noise(9, torch.bfloat16)
    logits[:, ::7] = -torch.inf
    logits[:, 1] = -0.0
    neutral = [Row(row.prompt, row.completion) for row in rows]
    assert torch.equal(penalise(logits, neutral).view(torch.int16), logits.view(torch.int16))
    result = penalise(logits, rows, only=[2, 5])
    rest = [i for i in range(9) if i not in (2, 5)]
    assert torch.equal(result[rest].view(torch.int16), logits[rest].view(torch.int16))
    assert torch.equal(result[[2, 5]], penalise(logits, rows)[[2, 5]]) and not torch.equal(result[[2, 5]], logits[[2, 5]])
    assert not result.isnan().any()


def test_half_types_are_penalised_in_float32() -> None:
    row = Row([7], [7] * 3, 1.1, 0.3, 0.7)
    logits = noise(1, torch.float16)
    expected = torch.tensor(float(logits[0, 7]), dtype=torch.float32)
    expected = (expected / 1.1 if expected > 0 else expected * 1.1) - 3 * 0.7 - 0.3
    assert penalise(logits, [row])[0, 7] == expected.half()


@pytest.mark.parametrize("chunk_elements", [2**23, 100])
@pytest.mark.parametrize("words", [1, 2, 3])
def test_bitmask(monkeypatch: pytest.MonkeyPatch, words: int, chunk_elements: int) -> None:
    """A mask narrower than the vocabulary, as wide, and wider (with set bits beyond it)."""
    monkeypatch.setattr(reference_penalties, "CHUNK_ELEMENTS", chunk_elements)
    bitmask = torch.randint(-(2**31), 2**31, (3, words), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    logits, rows = noise(5), [4, 0, 3]
    result = logits.clone()
    apply_token_bitmask(result, torch.tensor(rows), bitmask)
    for index, row in enumerate(rows):
        for token in range(VOCAB):
            allowed = token < 32 * words and bool((int(bitmask[index, token // 32]) >> (token % 32)) & 1)
            assert float(result[row, token]) == (float(logits[row, token]) if allowed else -torch.inf)
    assert torch.equal(result[[1, 2]], logits[[1, 2]])
