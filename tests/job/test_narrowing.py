"""Which rows are run apart, whatever came before, and that it ends: with the rows that kill, and with no others."""

from __future__ import annotations

import math
import random

import pytest

from batchinfer.job.narrowing import MOST_BARREN, PARTS, SUSPECT_AFTER, TIMES, Attempt, Event, Findings, find, split


def narrow(rows: range, poison: set[int], outside: random.Random | None = None) -> tuple[Findings, int, int]:
    """Lives of replicas until nothing is left to be tried. Returns what was found, deaths, and the most of them in a row.

    `outside` kills some replicas whatever they do, and takes down the nodes of others, which is not recorded.
    """
    attempts = [Attempt(Event.DIED, f"r{k}") for k in range(SUSPECT_AFTER)]
    deaths, barren, most_barren = SUSPECT_AFTER, SUSPECT_AFTER, SUSPECT_AFTER
    while (findings := find(attempts, rows)).sets:
        assert deaths < 50 * (len(poison) + 1) + 200, "it does not end"
        name, chosen = f"r{deaths}", findings.sets[0]
        attempts.append(Attempt(Event.BEGUN, name, chosen))
        if outside is not None and outside.random() < 0.1:
            attempts.append(Attempt(Event.DIED, name, reason="killed from outside"))
            deaths += 1
        elif outside is not None and outside.random() < 0.1:
            deaths += 1  # with its node
        elif poison.isdisjoint(chosen):
            attempts.append(Attempt(Event.PASSED, name, chosen))
            barren = 0
        else:
            attempts.append(Attempt(Event.DIED, name, reason=f"by {chosen}"))
            deaths, barren = deaths + 1, barren + 1
            most_barren = max(most_barren, barren)
    return findings, deaths, most_barren


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64, 100, 4096])
def test_one_row_that_kills(count: int) -> None:
    levels = 1 + math.ceil(math.log(count, PARTS) - 1e-9)
    for row in {0, count // 2, count - 1}:
        findings, deaths, barren = narrow(range(count), {row})
        assert findings.condemned == {row: f"by ({row},)"}
        assert deaths <= SUSPECT_AFTER + TIMES * levels
        assert barren <= MOST_BARREN, "nobody gives up on the way"


def test_any_rows_that_kill_among_kills_from_outside() -> None:
    """A row is condemned by what killed it twice when it ran alone; chance kills of the same row twice are told apart here."""
    for seed in range(200):
        rng = random.Random(seed)
        count = rng.randrange(1, 120)
        poison = set(rng.sample(range(count), rng.randrange(0, min(count, 6))))
        findings, _, _ = narrow(range(count), poison, rng)
        innocent = {row: reason for row, reason in findings.condemned.items() if row not in poison}
        assert poison <= findings.condemned.keys()
        assert all(reason == "killed from outside" for reason in innocent.values())


def test_no_innocent_dies_of_one_kill_from_outside() -> None:
    rows = range(3)
    history = [Attempt(Event.DIED, "a"), Attempt(Event.DIED, "b"), Attempt(Event.BEGUN, "c", (0, 1, 2))]
    once = find([*history, Attempt(Event.DIED, "c")], rows)
    assert once.sets == [(0, 1, 2)] and not once.condemned
    again = [*history, Attempt(Event.DIED, "c"), Attempt(Event.BEGUN, "d", (0, 1, 2)), Attempt(Event.PASSED, "d", (0, 1, 2))]
    assert find(again, rows).sets == []


def test_a_stop_is_no_attempt_and_a_stranger_no_cause() -> None:
    rows = range(4)
    begun = [Attempt(Event.BEGUN, "a", (0, 1, 2, 3)), Attempt(Event.BEGUN, "b", (0, 1, 2, 3))]
    assert find(begun, rows).deaths == 0 and not find(begun, rows).is_suspect
    assert not find([*begun, Attempt(Event.DIED, "z")], rows).kills
    stale = [Attempt(Event.BEGUN, "a", (7, 8)), Attempt(Event.DIED, "a")]
    assert find(stale, rows).sets == [(0, 1, 2, 3)], "of rows that are not asked for"


def test_a_set_that_killed_goes_behind_the_others() -> None:
    history = [Attempt(Event.DIED, "a"), Attempt(Event.DIED, "b")]
    for name in ("c", "d"):
        history += [Attempt(Event.BEGUN, name, (0, 1, 2)), Attempt(Event.DIED, name)]
    assert find(history, range(3)).sets == [(0,), (1,), (2,)]
    history += [Attempt(Event.BEGUN, "e", (0,)), Attempt(Event.DIED, "e")]
    assert find(history, range(3)).sets == [(1,), (2,), (0,)]


def test_where_nothing_works_no_row_is_condemned_before_it_is_given_up() -> None:
    history: list[Attempt] = []
    for k in range(MOST_BARREN + 1):
        findings = find(history, range(100))
        history += [Attempt(Event.BEGUN, str(k), findings.sets[0])] if findings.is_suspect else []
        history += [Attempt(Event.DIED, str(k))]
    assert not find(history, range(100)).condemned


def test_split() -> None:
    assert split(tuple(range(3))) == [(0,), (1,), (2,)]
    parts = split(tuple(range(100)))
    assert len(parts) == PARTS and sum(parts, ()) == tuple(range(100)) and max(map(len, parts)) == 13
