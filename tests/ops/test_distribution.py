"""Proof by counting: draws follow transformers' warpers, and neither positions nor seeds know of each other.

Every test rejects at P_MIN: a right sampler fails it for one in 10,000 choices of seeds, and one of this file's 35 tests for
one in 300. The seeds here are fixed, so that they pass always, until something changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchinfer.ops import apply_penalties, sample
from batchinfer.ops.reference_sampling import gumbel_noise
from tests.ops.chi_square import p_value

P_MIN = 1e-4
VOCAB, SEEDS, POSITIONS = 24, 400, 300
PROMPT, COMPLETION = [9, 9, 5, 11, 21], [2, 9, 2, 0, 2, 18]
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(11), dtype=torch.float64) * 1.5


@dataclass(frozen=True)
class Case:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def __str__(self) -> str:
        asked = (f"{name}={value}" for name, value in vars(self).items() if value != getattr(Case, name))
        return ",".join(asked) or "plain"


CASES = [
    Case(),
    Case(temperature=0.3),
    Case(temperature=2.5),
    Case(top_k=1),
    Case(top_k=6),
    Case(top_p=0.9),
    Case(top_p=0.4),
    Case(min_p=0.05),
    Case(min_p=0.3),
    Case(temperature=1.4, top_k=12, top_p=0.85),
    Case(temperature=0.7, top_k=15, top_p=0.95, min_p=0.02),
    Case(temperature=2.0, top_p=0.8, min_p=0.1),
    Case(repetition=1.3),
    Case(repetition=0.6, temperature=0.8),
    Case(repetition=1.2, temperature=1.5, top_k=10, top_p=0.9, min_p=0.05),
    Case(presence=0.8),
    Case(frequency=0.5, temperature=1.2),
    Case(repetition=1.1, presence=-0.3, frequency=0.4, top_p=0.95),
]


def expected(case: Case) -> torch.Tensor:
    """Probabilities [VOCAB] by transformers' processors, in the order of its `generate`; it has no additive penalties."""
    tokens = torch.tensor([PROMPT + COMPLETION])
    scores = RepetitionPenaltyLogitsProcessor(case.repetition)(tokens, LOGITS[None].clone())
    counts = torch.tensor(COMPLETION).bincount(minlength=VOCAB)
    scores = scores - case.frequency * counts - case.presence * (counts > 0)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(case.temperature)])
    if case.top_k:
        warpers.append(TopKLogitsWarper(case.top_k))
    if case.top_p < 1:
        warpers.append(TopPLogitsWarper(case.top_p))
    if case.min_p:
        warpers.append(MinPLogitsWarper(case.min_p))
    return warpers(tokens, scores)[0].softmax(-1)


def observed(case: Case, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """How often each token came in SEEDS * POSITIONS draws."""

    def filled(value: float, count: int = SEEDS * POSITIONS) -> torch.Tensor:
        return torch.full((count,), value, dtype=torch.float64)

    logits = LOGITS[None].to(dtype, copy=True)
    history = torch.tensor([PROMPT + COMPLETION], dtype=torch.int32)
    zero, penalties = torch.zeros(1, dtype=torch.int64), (case.repetition, case.presence, case.frequency)
    length, prompt_len = torch.tensor([history.numel()]), torch.tensor([len(PROMPT)])
    apply_penalties(logits, zero, history, zero[None], length, zero, prompt_len, *(filled(p, 1) for p in penalties))
    seeds = (torch.arange(SEEDS) * 0x9E3779B97F4A7C15).repeat_interleave(POSITIONS)
    positions = torch.arange(POSITIONS).repeat(SEEDS)
    limits = (filled(case.top_k).int(), filled(case.top_p), filled(case.min_p))
    tokens = sample(logits.expand(len(seeds), -1), filled(case.temperature), *limits, seeds, positions)
    return tokens.bincount(minlength=VOCAB)


def independence(first: torch.Tensor, second: torch.Tensor) -> float:
    """p-value of the chi-square test of a table of pairs against the product of its margins."""
    table = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    table.index_put_((first, second), torch.ones((), dtype=torch.float64), accumulate=True)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    wanted = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    statistic = ((table - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_warpers(case: Case) -> None:
    counts = observed(case)
    assert int(counts.sum()) == SEEDS * POSITIONS
    assert p_value(counts, expected(case)) > P_MIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_from_narrow_logits_follow_their_own_softmax(dtype: torch.dtype) -> None:
    assert p_value(observed(Case(), dtype), LOGITS.to(dtype).double().softmax(-1)) > P_MIN


@pytest.mark.parametrize(
    ("drawn", "claimed"),
    [
        (Case(temperature=1.05), Case()),
        (Case(top_k=7), Case(top_k=6)),
        (Case(top_k=6), Case(top_k=7)),
        (Case(top_p=0.87), Case(top_p=0.9)),
        (Case(min_p=0.06), Case(min_p=0.05)),
        (Case(repetition=1.25), Case(repetition=1.3)),
        (Case(presence=0.7), Case(presence=0.8)),
        (Case(frequency=0.45), Case(frequency=0.5)),
        (Case(presence=0.5), Case(frequency=0.5)),
    ],
    ids=str,
)
def test_a_slightly_wrong_distribution_would_be_seen(drawn: Case, claimed: Case) -> None:
    assert not torch.equal(expected(drawn), expected(claimed))
    assert p_value(observed(drawn), expected(claimed)) < P_MIN


def _plain_draws(seeds: torch.Tensor, positions: torch.Tensor, vocab: int = 8) -> torch.Tensor:
    count = len(seeds)
    one, zero = torch.ones(count), torch.zeros(count)
    return sample(LOGITS[:vocab].expand(count, -1), one, zero.int(), one, zero, seeds, positions)


@pytest.mark.parametrize("step", [1, 2, 128])
def test_positions_are_independent(step: int) -> None:
    seeds = torch.arange(SEEDS).repeat_interleave(POSITIONS)
    positions = torch.arange(POSITIONS).repeat(SEEDS)
    assert independence(_plain_draws(seeds, positions), _plain_draws(seeds, positions + step)) > P_MIN


@pytest.mark.parametrize("other", [lambda s: s + SEEDS, lambda s: s ^ (1 << 32), lambda s: s ^ (-1 << 63), lambda s: ~s])
def test_seeds_are_independent(other) -> None:  # type: ignore[no-untyped-def]
    """Neighbours, one bit of either half apart, and all bits."""
    seeds = torch.arange(SEEDS).repeat_interleave(POSITIONS)
    positions = torch.arange(POSITIONS).repeat(SEEDS)
    assert independence(_plain_draws(seeds, positions), _plain_draws(other(seeds), positions)) > P_MIN


def test_dependence_would_be_seen() -> None:
    """One draw in fifty that repeats the one before it."""
    seeds = torch.arange(SEEDS * POSITIONS)
    first, second = _plain_draws(seeds, 0 * seeds), _plain_draws(seeds, 0 * seeds + 1)
    assert independence(first, second) > P_MIN
    assert independence(first, torch.where(seeds % 50 == 0, first, second)) < P_MIN


def test_noise_of_neighbouring_tokens_is_uncorrelated() -> None:
    """Words of one Philox block and of the next one. A correlation of n pairs passes 3.9 / sqrt(n) once in 10,000 times."""
    noise = gumbel_noise(torch.arange(2000), torch.arange(2000) % 7, 50).flatten(1)
    noise = (noise - noise.mean()) / noise.std()
    for lag in range(1, 9):
        pairs = noise[:, lag:] * noise[:, :-lag]
        assert abs(float(pairs.mean())) < 3.9 / pairs.numel() ** 0.5
