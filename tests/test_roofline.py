"""The simulation of steps: many alike at once against one by one, and the engine's way with a full cache, by hand."""

from __future__ import annotations

import random

import pytest

from batchinfer import roofline
from batchinfer.roofline import Cost, Limits, Step, Work, simulate

COST = Cost(layer_params=2.0, head_params=0.0, param_bytes=0, kv_bytes=10, attention_ops=100, hidden_bytes=1, all_reduces=0)
WINDOWED = Cost(2.0, 0.0, 0, 10, 100, 1, 0, window=40, windowed_share=0.75)


def drawn(seed: int, prefix: int = 0) -> Work:
    draw = random.Random(seed)
    prompts = tuple(draw.randint(1, 60) for _ in range(50))
    return Work(prefix, prompts, tuple(draw.randint(1, 90) for _ in range(50)))


def totals(work: Work, cost: Cost, limits: Limits) -> tuple[int, float, float, float, float]:
    steps = list(simulate(work, cost, limits))
    sums = [sum(step.repeats * value(step) for step in steps) for value in (tokens, outputs, keys, prefill)]
    return sum(step.repeats for step in steps), *sums  # type: ignore[return-value]


def tokens(step: Step) -> float:
    return step.tokens


def outputs(step: Step) -> float:
    return step.outputs


def keys(step: Step) -> float:
    return step.keys


def prefill(step: Step) -> float:
    return step.prefill_ops


@pytest.mark.parametrize("cost", [COST, WINDOWED])
@pytest.mark.parametrize(
    "limits",
    [Limits(10_000, 64), Limits(700, 64), Limits(150, 64, max_seqs=5), Limits(700, 64, expected=0.5)],
    ids=["room", "full", "few", "expected"],
)
@pytest.mark.parametrize("prefix", [0, 30])
def test_steps_alike_come_to_what_single_ones_do(
    cost: Cost, limits: Limits, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [drawn(seed, prefix) for seed in range(3)]
    together = [totals(work, cost, limits) for work in works]
    assert any(step.repeats > 1 for step in simulate(works[0], cost, limits))
    monkeypatch.setattr(roofline._Rows, "steps_alike", lambda *_: 1)
    for work, found in zip(works, together, strict=True):
        assert found == pytest.approx(totals(work, cost, limits), rel=1e-12)


def test_every_token_is_drawn_and_every_prompt_computed() -> None:
    work = drawn(7, prefix=11)
    _, computed, drawn_tokens, _, _ = totals(work, COST, Limits(100_000, 64))
    assert drawn_tokens == sum(work.completions)
    assert computed == 11 + sum(work.prompts) + sum(count - 1 for count in work.completions)


def test_the_youngest_row_gives_way_to_a_full_cache_and_is_computed_again() -> None:
    """Two prompts of 4 tokens that draw 6: once each has drawn one all 10 places are taken."""
    steps = list(simulate(Work(0, (4, 4), (6, 6)), COST, Limits(10, 64)))
    assert (steps[0].outputs, steps[1].outputs) == (2, 1)
    computed = sum(step.repeats * step.tokens for step in steps)
    assert computed == 2 * (4 + 5) + 4  # the youngest one's prompt a second time
    assert sum(step.repeats * step.outputs for step in steps) == 12


def test_rows_wait_for_a_seat() -> None:
    work = Work(0, (1,) * 6, (4,) * 6)
    assert totals(work, COST, Limits(1000, 64, max_seqs=2))[0] == 12
    assert totals(work, COST, Limits(1000, 64))[0] == 4


def test_a_prompt_larger_than_the_cache_leaves_runs_alone() -> None:
    assert totals(Work(0, (50, 50), (2, 2)), COST, Limits(60, 8))[0] == 4
