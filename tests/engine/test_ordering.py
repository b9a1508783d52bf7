"""A window's order: alike next to alike, and otherwise untouched."""

from __future__ import annotations

import random
from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.ordering import PIECE, order_window


def distinct(name: int, length: int) -> list[int]:
    return [name * 10_000 + i for i in range(length)]


def test_prompts_that_share_a_beginning_come_together_where_the_first_of_them_came() -> None:
    a, b = distinct(1, 100), distinct(2, 100)
    prompts = [[*a, 1], [*b, 1], distinct(3, 20), [*a, 2], [*b, 2], distinct(4, 20), [*a, 1]]
    assert order_window(prompts) == [0, 6, 3, 1, 4, 2, 5]


def test_a_longer_beginning_counts_for_more() -> None:
    instruction = distinct(1, 2 * PIECE)
    one, two = [*instruction, *distinct(2, PIECE)], [*instruction, *distinct(3, PIECE)]
    assert order_window([[*one, 1], [*two, 1], instruction, [*one, 2], [*two, 2]]) == [0, 3, 1, 4, 2]


def test_without_a_common_beginning_the_order_stays() -> None:
    assert order_window([distinct(i, 5 + i % 3 * 70) for i in (5, 3, 9, 1, 7)]) == [0, 1, 2, 3, 4]
    assert order_window([]) == []
    assert order_window([[], [1], []]) == [0, 2, 1]


def test_samples_stay_together_however_long() -> None:
    prompt = distinct(1, 50_000)
    assert order_window([prompt, prompt, distinct(2, 10), prompt]) == [0, 1, 3, 2]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 60))
def test_every_common_beginning_stands_in_one_stretch(seed: int, count: int) -> None:
    rng = random.Random(seed)
    prompts = [[i for _ in range(rng.randint(0, 4)) for i in [rng.randrange(2)] * PIECE] for _ in range(count)]
    for prompt in prompts:
        prompt += [9] * rng.randint(0, 2)
    order = order_window(prompts)
    assert sorted(order) == list(range(count))
    for depth in range(PIECE, 5 * PIECE, PIECE):
        beginnings = [tuple(prompts[i][:depth]) for i in order]
        stretches = [beginning for beginning, _ in groupby(beginnings)]
        assert len(stretches) == len(set(stretches))
    for prompt in prompts:
        same = [i for i in order if prompts[i] == prompt]
        assert same == sorted(same)
