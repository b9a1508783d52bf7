"""Wall time and tails, from spans of steps and from what replicas say of their ends."""

from __future__ import annotations

import pytest

from batchinfer.stretches import Ending, tails, wall

Spans = dict[str, tuple[float, float]]


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ({}, 0),
        ({"01-0-0": (0, 10), "01-0-1": (1, 7)}, 10),
        ({"01-0-0": (0, 10), "02-0-0": (100, 105)}, 15),  # resumed after a pause
        ({"01-0-0": (0, 10), "02-0-0": (2, 12)}, 12),  # two submissions at once
        ({"01-0-0": (0, 10), "02-0-0": (2, 12), "03-0-0": (11, 13), "04-0-0": (20, 21)}, 14),
    ],
)
def test_time_is_counted_once_and_pauses_not_at_all(spans: Spans, seconds: float) -> None:
    assert wall(spans) == seconds


def test_from_the_first_idle_replica_to_the_last_commit() -> None:
    spans = {"01-0-0": (0.0, 10.0), "01-1-0": (0.0, 7.0), "01-2-0": (0.0, 5.0)}
    endings = {"01-0-0": Ending(10.8, 10.5), "01-1-0": Ending(7.25, 7.2), "01-2-0": Ending(9.0, 5.5)}
    assert tails(spans, endings) == {"01": 3.25}, "not from the last step, but from the last claim that found nothing"


def test_one_replica_has_no_tail() -> None:
    assert tails({"01-0-0": (0, 10)}, {"01-0-0": Ending(10.2, 10.1)}) == {"01": 0.0}


def test_who_died_was_stopped_or_never_worked_was_not_idle() -> None:
    spans = {"01-0-0": (0, 10), "01-1-0": (0, 2), "01-2-0": (1, 2)}
    endings = {"01-0-0": Ending(10.2, 10.1), "01-1-0": Ending(None, 1.5), "01-2-0": Ending(3.0, None)}
    assert tails(spans, endings) == {"01": 0.0}
    assert tails({"01-1-0": (0, 2)}, endings) == {"01": None}, "all were stopped: nobody found that nothing was left"


def test_each_submission_has_its_own_and_pauses_are_in_none() -> None:
    spans = {"01-0-0": (0, 10), "01-1-0": (0, 6), "02-0-0": (100, 105), "02-1-0": (100, 104)}
    endings = {
        "01-0-0": Ending(None, 9.0),  # stopped
        "01-1-0": Ending(6.0, 5.0),
        "02-0-0": Ending(105.5, 105.0),
        "02-1-0": Ending(104.0, 103.0),
    }
    assert tails(spans, endings) == {"01": 3.0, "02": 1.0}
    assert list(tails({**spans, "02-0-0": (8, 105)}, endings).items()) == [("01+02", 99.0)], "two at once are one"
