"""Tokens chosen by the kernels against the reference: the same ones, but for near-ties of float32 sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from batchinfer.ops import reference_sampling, sampling
from batchinfer.ops.reference_sampling import filter_scores, gumbel_noise
from tests.ops.chi_square import p_value

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VOCABULARIES = [1, 17, 257, 1000, 32000, 128256]
SPLITS = [0, 1, 8]
PAIRS = list(zip(DTYPES, SPLITS, strict=True))
P_MIN = 1e-4  # a right sampler fails for one in 10,000 choices of seeds; the seeds here are fixed
NAN, INF = float("nan"), float("inf")


@dataclass
class Rows:
    """What rows ask for, [S] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor

    @classmethod
    def of(cls, rows: int, seed: int = 0, **given: object) -> Rows:
        """Plain draws at temperature 1, but for what is given: numbers, or tensors [S]."""
        random = torch.Generator().manual_seed(seed)
        values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given

        def tensor(name: str, value: object) -> Tensor:
            made = value if isinstance(value, Tensor) else torch.tensor([value] * rows, dtype=torch.float64)
            return made.to("cuda", torch.int32 if name == "top_k" else torch.float64)

        made = {name: tensor(name, value) for name, value in values.items()}
        seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=random).cuda()
        return cls(**made, seeds=seeds, positions=torch.randint(0, 10**6, (rows,), generator=random, dtype=torch.int32).cuda())

    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        return Rows(*(argument[rows] for argument in self.arguments()))


def logits_of(rows: int, vocab_size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, pad: int = 0) -> Tensor:
    """Rows `vocab_size + pad` apart; what lies between them is NaN."""
    random = torch.Generator("cuda").manual_seed(seed)
    wide = torch.full((rows, vocab_size + pad), NAN, dtype=dtype, device="cuda")
    wide[:, :vocab_size] = 3 * torch.randn(rows, vocab_size, generator=random, device="cuda")
    return wide[:, :vocab_size]


def assert_greedy(logits: Tensor, splits: int = 0) -> None:
    token_ids, broken = sampling.greedy(logits, splits)
    expected, expected_broken = reference_sampling.greedy(logits)
    assert torch.equal(broken, expected_broken)
    assert torch.equal(token_ids, expected)


def kept(scores: Tensor, asked: Rows, slack: float) -> Tensor:
    """Scores in float64 after the filters, each taken wider (slack > 0) or narrower by so much."""
    top_p = torch.where(asked.top_p < 1, (asked.top_p.float().double() + slack).clamp(max=1), asked.top_p)
    return filter_scores(scores, asked.top_k, top_p, asked.min_p.float().double() * (1 - slack))


def assert_drawn(logits: Tensor, asked: Rows, splits: int = 0, likeness: float = 0.99) -> None:
    """Every token must be among those that may come and have the highest sum of score and noise of those that must stay."""
    token_ids, broken = sampling.draw(logits, *asked.arguments(), splits)
    expected = reference_sampling.sample(logits, *asked.arguments())
    assert not broken.any()
    greedy = asked.temperature == 0
    assert torch.equal(token_ids[greedy], expected[greedy])
    assert (token_ids == expected).double().mean() >= likeness
    for part in torch.nonzero(~greedy).flatten().split(16):
        wide, row = logits[part].float(), asked[part]
        heat = row.temperature.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        scores = ((wide - wide.amax(-1, keepdim=True)) / heat).double()
        sums = scores + gumbel_noise(row.seeds, row.positions, logits.shape[1])
        ours = token_ids[part].unsqueeze(1)
        may, must = (kept(scores, row, slack).isfinite() for slack in (1e-5, -1e-5))
        assert may.gather(1, ours).all(), "a token that was cut"
        best = sums.masked_fill(~must, -INF).amax(-1)
        assert (sums.gather(1, ours).squeeze(1) >= best - 1e-5).all(), "a token that another one beats"


@pytest.mark.parametrize(("dtype", "splits"), PAIRS, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_greedy_is_argmax(vocab_size: int, dtype: torch.dtype, splits: int) -> None:
    for rows, pad in ((1, 0), (3, 8), (37, 3)):
        assert_greedy(logits_of(rows, vocab_size, dtype, rows, pad), splits)


@pytest.mark.parametrize(("dtype", "splits"), PAIRS, ids=str)
def test_of_equals_the_lowest_id_is_taken(dtype: torch.dtype, splits: int) -> None:
    random = torch.Generator("cuda").manual_seed(0)
    for vocab_size in (17, 1000, 40000):
        assert_greedy(torch.randint(-3, 3, (50, vocab_size), generator=random, device="cuda").to(dtype), splits)
        zeros = torch.zeros(50, vocab_size, dtype=dtype, device="cuda")
        zeros[torch.rand(50, vocab_size, generator=random, device="cuda") < 0.9] *= -1
        assert_greedy(zeros, splits)


def broken_rows(vocab_size: int, dtype: torch.dtype) -> Tensor:
    logits = logits_of(12, vocab_size, dtype)
    logits[0] = NAN
    logits[1, vocab_size // 2] = NAN
    logits[2, -1] = NAN
    logits[3, 3], logits[3, 5] = INF, NAN
    logits[4, [4, 9]] = INF
    logits[5] = -INF
    logits[6] = -INF
    logits[6, vocab_size - 2] = -300.0
    logits[7] = INF
    logits[8, [7, 5]] = NAN
    return logits


@pytest.mark.parametrize(("dtype", "splits"), PAIRS, ids=str)
@pytest.mark.parametrize("vocab_size", [17, 1000, 40000])
def test_rows_that_are_no_numbers(vocab_size: int, dtype: torch.dtype, splits: int) -> None:
    logits = broken_rows(vocab_size, dtype)
    assert_greedy(logits, splits)
    for limits in ({}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}):
        asked = Rows.of(12, **limits)
        ours, broken = sampling.draw(logits, *asked.arguments(), splits)
        assert broken.tolist() == [i in (0, 1, 2, 3, 8) for i in range(12)]
        assert torch.equal(ours, reference_sampling.sample(logits, *asked.arguments()))


@pytest.mark.parametrize(("dtype", "splits"), PAIRS, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_draws_are_those_of_the_reference(vocab_size: int, dtype: torch.dtype, splits: int) -> None:
    random = torch.Generator().manual_seed(vocab_size)
    for rows, pad in ((1, 0), (70, 8), (33, 5)):
        temperature = torch.rand(rows, generator=random) * 2 * (torch.arange(rows) % 4 > 0)
        assert_drawn(logits_of(rows, vocab_size, dtype, rows, pad), Rows.of(rows, rows, temperature=temperature), splits)


def test_thousands_of_draws_are_those_of_the_reference() -> None:
    for vocab_size in (17, 1000, 32000):
        logits = logits_of(1, vocab_size).expand(4096, -1)
        for temperature in (0.1, 1.0, 10.0):
            asked = Rows.of(4096, temperature=temperature)
            ours, expected = sampling.sample(logits, *asked.arguments()), reference_sampling.sample(logits, *asked.arguments())
            assert int((ours != expected).sum()) <= 1


FILTERS: list[dict[str, object]] = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 200, "top_p": 0.8},
    {"top_k": 1000, "top_p": 0.95, "min_p": 0.02, "temperature": 2.0},
    {"top_p": 0.5, "temperature": 100.0},
    {"top_k": 5, "top_p": 0.9, "temperature": 1e-30},
]


@pytest.mark.parametrize(("dtype", "splits"), PAIRS, ids=str)
@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_filters_leave_what_the_reference_leaves(asked: dict[str, object], dtype: torch.dtype, splits: int) -> None:
    for vocab_size, rows in ((17, 200), (1000, 200), (32000, 40), (128256, 10)):
        assert_drawn(logits_of(rows, vocab_size, dtype, 5), Rows.of(rows, **asked), splits, 0.95)


@pytest.mark.parametrize("splits", SPLITS)
def test_every_row_has_its_own_filters(splits: int) -> None:
    random = torch.Generator().manual_seed(3)
    rows = 150

    def some(share: float, values: Tensor, otherwise: float) -> Tensor:
        return torch.where(torch.rand(rows, generator=random) < share, values.double(), otherwise)

    asked = Rows.of(
        rows,
        temperature=some(0.8, torch.rand(rows, generator=random) * 2, 0.0),
        top_k=some(0.5, torch.randint(0, 400, (rows,), generator=random), 0),
        top_p=some(0.5, torch.rand(rows, generator=random), 1.0),
        min_p=some(0.5, torch.rand(rows, generator=random) * 0.2, 0.0),
    )
    for vocab_size, pad in ((333, 0), (32000, 8), (50257, 0)):
        assert_drawn(logits_of(rows, vocab_size, pad=pad), asked, splits, 0.95)


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("levels", [1, 2, 6])
def test_equals_at_the_border_of_top_p(levels: int, splits: int) -> None:
    """With few distinct logits every border cuts through equals, of which the lower ids stay."""
    random = torch.Generator("cuda").manual_seed(levels)
    for vocab_size in (16, 1000, 30000):
        logits = torch.randint(0, levels, (64, vocab_size), generator=random, device="cuda").bfloat16()
        assert_drawn(logits, Rows.of(64, top_p=torch.linspace(0.01, 0.99, 64)), splits, 0.9)
        assert_drawn(logits, Rows.of(64, top_k=torch.arange(64) + 1), splits)


def test_limits_that_cut_nothing_change_nothing() -> None:
    logits = logits_of(64, 5000)
    plain = sampling.sample(logits, *Rows.of(64).arguments())
    for limits in ({"top_k": 5000}, {"top_k": 10**6}, {"top_p": 1 - 1e-12}, {"min_p": 1e-300}):
        assert torch.equal(sampling.sample(logits, *Rows.of(64, **limits).arguments()), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_stay_equal_at_the_tiniest_temperature(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0], dtype=dtype, device="cuda").expand(200, 4)
    for temperature in (1e-8, 5e-324):  # the least float64 is 0 in float32
        drawn = sampling.sample(logits, *Rows.of(200, temperature=temperature).arguments())
        assert set(drawn.tolist()) == {1, 3} and 60 < int((drawn == 3).sum()) < 140


@pytest.mark.parametrize("limits", [{}, {"top_k": 9}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_the_only_token_that_may_come_comes(limits: dict[str, object]) -> None:
    logits = torch.full((3, 5000), -INF, dtype=torch.bfloat16, device="cuda")
    logits[:, 4011] = -300.0
    for splits in SPLITS:
        assert sampling.draw(logits, *Rows.of(3, temperature=1.3, **limits).arguments(), splits)[0].tolist() == [4011] * 3


@pytest.mark.parametrize("limits", [{}, {"temperature": 0.4}, {"top_k": 6}, {"top_k": 15, "top_p": 0.95, "min_p": 0.02}], ids=str)
def test_draws_follow_the_softmax(limits: dict[str, float]) -> None:
    row, count = 1.5 * torch.randn(24, generator=torch.Generator().manual_seed(11)), 120_000
    asked = Rows.of(count, **limits)
    counts = sampling.sample(row.cuda().expand(count, -1), *asked.arguments()).bincount(minlength=24).cpu()
    scores = (row.double() / limits.get("temperature", 1.0))[None]
    one = [argument[:1].cpu() for argument in asked.arguments()[1:4]]
    assert p_value(counts, filter_scores(scores, *one)[0].softmax(-1)) > P_MIN


def test_a_draw_depends_on_its_row_alone() -> None:
    logits, asked = logits_of(64, 32000), Rows.of(64, top_p=0.9, top_k=torch.arange(64) % 7 * 100)
    together = sampling.sample(logits, *asked.arguments())
    for i in range(64):
        assert sampling.sample(logits[i : i + 1], *asked[i : i + 1].arguments()).tolist() == [int(together[i])]


def captured(run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("limits", [None, {}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_replays_of_a_graph_choose_anew(limits: dict[str, object] | None) -> None:
    logits, asked = logits_of(9, 32000), Rows.of(9, **(limits or {}))
    run = (lambda: sampling.greedy(logits)) if limits is None else (lambda: sampling.draw(logits, *asked.arguments()))
    graph, (token_ids, broken) = captured(run)
    for seed in range(5):
        logits.copy_(logits_of(9, 32000, seed=seed))
        logits[seed, 77] = NAN
        asked.seeds += 1
        token_ids.fill_(-1)
        graph.replay()
        expected, expected_broken = run()
        assert torch.equal(token_ids, expected) and torch.equal(broken, expected_broken) and int(broken.sum()) == 1


def test_nothing_waits_for_the_device() -> None:
    logits, asked = logits_of(9, 32000), Rows.of(9, top_k=40, top_p=0.9, min_p=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampling.greedy(logits)
        sampling.sample(logits, *asked.arguments())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_rows() -> None:
    token_ids, broken = sampling.greedy(logits_of(0, 100))
    assert len(token_ids) == len(broken) == 0
    assert len(sampling.sample(logits_of(0, 100), *Rows.of(0).arguments())) == 0


def test_float64_and_columns_that_are_not_dense() -> None:
    logits = logits_of(5, 600, torch.float32)
    asked = Rows.of(5)
    assert torch.equal(
        sampling.sample(logits.double(), *asked.arguments()), reference_sampling.sample(logits, *asked.arguments())
    )
    assert torch.equal(sampling.greedy(logits[:, ::2])[0], logits[:, ::2].argmax(-1).int())
