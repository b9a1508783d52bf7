"""Random draws: the generator's published answers, the right distribution, and dependence on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from batchinfer.ops import draw, greedy, sample
from batchinfer.ops.reference_sampling import filter_scores, gumbel_noise, philox4x32

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    ("words", "answer"),
    [  # Random123's kat_vectors: counter, then key
        ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_known_answers(words, answer):
    c0, c1, c2, c3, k0, k1 = (torch.tensor(word) for word in words)
    assert tuple(philox4x32((c0, c1, c2, c3), (k0, k1)).tolist()) == answer


def _sample(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None):
    rows = len(logits)
    full = lambda value, dtype=torch.float64: torch.full((rows,), value, dtype=dtype)  # noqa: E731
    seeds = torch.arange(rows) if seeds is None else seeds
    positions = full(5, torch.int32) if positions is None else positions
    return sample(logits, full(temperature), full(top_k, torch.int32), full(top_p), full(min_p), seeds, positions)


def _chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_draws_follow_the_softmax(vary):
    """18 degrees of freedom: chance passes 51 once in 17,000 times, and these draws are always the same ones."""
    row, count, temperature = torch.randn(19, generator=torch.Generator().manual_seed(0)), 20_000, 1.7
    numbers = {vary: torch.arange(count) + 2**40 if vary == "seeds" else torch.arange(count)}
    if vary == "positions":
        numbers["seeds"] = torch.full((count,), -3)
    tokens = _sample(row.expand(count, -1), temperature, **numbers)
    assert _chi_square(tokens.bincount(minlength=19).double(), (row.double() / temperature).softmax(-1)) < 51


def test_filtered_draws_follow_the_renormalised_softmax():
    row, count = torch.randn(19, generator=torch.Generator().manual_seed(0)), 20_000
    tokens = _sample(row.expand(count, -1), top_k=6)
    kept = row.topk(6).indices
    counts = tokens.bincount(minlength=19)
    assert counts[kept].sum() == count
    assert _chi_square(counts[kept].double(), row[kept].double().softmax(-1)) < 26  # 5 degrees of freedom


@pytest.mark.parametrize("top_k", [0, 1, 5, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_filters_keep_what_transformers_keeps(top_k, top_p, min_p):
    scores = torch.randn(6, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    expected = scores.clone()
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    for warper in [*warpers, TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]:
        expected = warper(None, expected)
    limits = (torch.full((6,), value) for value in (top_k, top_p, min_p))
    assert torch.equal(filter_scores(scores, *limits), expected)


def test_ties_at_the_border():
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    assert filter_scores(scores, 3 * one.long(), one, 0 * one).isfinite().tolist() == [[True] * 5]
    assert filter_scores(scores, 0 * one.long(), 0.1 * one, 0 * one).isfinite().tolist() == [[False, True, False, False, False]]


def test_a_draw_depends_on_its_row_alone():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 333, generator=generator)
    settings = [
        torch.rand(64, generator=generator) * (torch.arange(64) % 3),  # a third greedy
        torch.randint(0, 40, (64,), generator=generator),
        torch.rand(64, generator=generator) * 0.5 + 0.6,
        torch.rand(64, generator=generator) * 0.1,
        torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator),
        torch.randint(0, 9999, (64,), generator=generator),
    ]
    together = sample(logits, *settings)
    for i in range(64):
        assert sample(logits[i : i + 1], *(s[i : i + 1] for s in settings)).tolist() == [int(together[i])]
    order = torch.randperm(64, generator=generator)
    assert torch.equal(sample(logits[order], *(s[order] for s in settings)), together[order])


def test_noise_does_not_depend_on_the_size_of_the_vocabulary():
    seeds, positions = torch.tensor([1, -1]), torch.tensor([0, 7])
    assert torch.equal(gumbel_noise(seeds, positions, 1000)[:, :13], gumbel_noise(seeds, positions, 13))


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 0.0},
        {"temperature": 1e-8},
        {"temperature": 1e-30},
        {"temperature": 5e-324},
        {"top_p": 1e-9},
        {"top_p": 5e-324},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 1e-8, "top_p": 1e-9, "top_k": 9, "min_p": 1.0},
    ],
    ids=str,
)
def test_extremes_take_the_likeliest(extreme, dtype):
    logits = torch.rand(5, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    logits[:, 7], logits[:, 3] = 9.0, -torch.inf
    assert _sample(logits, **extreme).tolist() == [7] * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_stay_equal_at_the_tiniest_temperature(dtype):
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0], dtype=dtype).expand(200, 4)
    for temperature in (1e-8, 5e-324):  # the least float64 is 0 in float32
        assert 60 < int((_sample(logits, temperature) == 3).sum()) < 140


@pytest.mark.parametrize("limits", [{}, {"top_k": 9}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_only_token_that_may_come_comes(dtype, limits):
    logits = torch.full((3, 50), -torch.inf, dtype=dtype)
    logits[:, 11] = -300.0
    assert _sample(logits, temperature=1.3, **limits).tolist() == [11] * 3


def test_limits_that_cut_nothing_change_nothing():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(3))
    plain = _sample(logits)
    assert len(plain.unique()) > 10
    for limits in ({"top_k": 50}, {"top_k": 10**6}, {"top_p": 1 - 1e-12}, {"min_p": 1e-300}):
        assert torch.equal(_sample(logits, **limits), plain)


@pytest.mark.parametrize("limits", [{}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}])
@pytest.mark.parametrize("poison", [[torch.nan], [torch.inf], [-torch.inf] * 50, [torch.nan] * 50])
def test_a_broken_row_spoils_no_other(poison, limits):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    before = _sample(logits, **limits).tolist()
    logits[1, : len(poison)] = torch.tensor(poison)
    after = _sample(logits, **limits).tolist()
    assert after[::2] == before[::2] and 0 <= after[1] < 50


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_lowest_of_equals_and_tells_rows_with_nan(dtype):
    logits = torch.tensor(
        [[1, 3, 3, 0], [2, torch.nan, 5, torch.nan], [-torch.inf] * 4, [0, torch.inf, torch.inf, 1]], dtype=dtype
    )
    token_ids, broken = greedy(logits)
    assert token_ids.dtype == torch.int32
    assert token_ids.tolist() == [1, 1, 0, 1] and broken.tolist() == [False, True, False, False]


def test_draw_is_sample_and_tells_rows_with_nan():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    logits[1, 7] = torch.nan
    one = torch.ones(3, dtype=torch.float64)
    settings = (one, 0 * one.int(), one, 0 * one, torch.arange(3), torch.arange(3))
    token_ids, broken = draw(logits, *settings)
    assert torch.equal(token_ids, sample(logits, *settings)) and broken.tolist() == [False, True, False]
