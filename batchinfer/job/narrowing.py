"""Which rows of a unit kill replicas: what has been tried with them, replayed into what is to be tried next.

A unit that killed two replicas is suspect. Its rows are then run apart from all others, first all together, and a set that kills
twice is split, until a single row has killed twice when it ran alone. A set that killed goes behind those that did not: what a
sound replica can do is done, and a place where nothing works is known by deaths without anything in between. The state is the
list of attempts and nothing else, so that whoever goes on with it comes to the same.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SUSPECT_AFTER = 2  # deaths of replicas that held the unit
TIMES = 2  # that a set has to kill before it is split or condemned: once may be somebody's kill -9
PARTS = 8  # into which a set is split: what passes costs little, what kills costs a load of the model
MOST_BARREN = 7  # deaths in a row after which nothing had been gained: two in company, two of all rows, and some of their parts


class Event(enum.StrEnum):
    BEGUN = "begun"  # a replica is about to run these rows apart
    PASSED = "passed"  # it has done so
    DIED = "died"  # a replica that held the unit


@dataclass(frozen=True)
class Attempt:
    """`rows`: places in the unit, of those run apart. `reason`: of the death."""

    event: Event
    replica: str
    rows: tuple[int, ...] = ()
    reason: str = ""


@dataclass
class Findings:
    """What a unit's attempts come to."""

    sets: list[tuple[int, ...]]  # still to be run apart, in this order
    deaths: int = 0
    condemned: dict[int, str] = field(default_factory=dict)  # rows, and how they killed
    kills: Counter[tuple[int, ...]] = field(default_factory=Counter)
    running: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by replica: what it has begun, and not passed

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= SUSPECT_AFTER

    def add(self, attempt: Attempt) -> None:
        if attempt.event is Event.BEGUN:
            self.running[attempt.replica] = attempt.rows
            return
        begun = self.running.pop(attempt.replica, None)
        if attempt.event is Event.PASSED:
            passed = set(attempt.rows)
            self.sets = [left for rows in self.sets if (left := tuple(row for row in rows if row not in passed))]
        else:
            self.deaths += 1
            if begun in self.sets:
                self._killed(begun, attempt.reason)
        self.sets.sort(key=lambda rows: self.kills[rows])

    def _killed(self, rows: tuple[int, ...], reason: str) -> None:
        self.kills[rows] += 1
        if self.kills[rows] < TIMES:
            return
        self.sets.remove(rows)
        if len(rows) == 1:
            self.condemned[rows[0]] = reason
        else:
            self.sets += split(rows)


def find(attempts: Iterable[Attempt], rows: Sequence[int]) -> Findings:
    """What the attempts with a unit say of its rows, or of those that a retry computes."""
    findings = Findings([tuple(rows)])
    for attempt in attempts:
        findings.add(attempt)
    return findings


def split(rows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Parts of nearly equal length, in order."""
    size = -(-len(rows) // PARTS)
    return [rows[start : start + size] for start in range(0, len(rows), size)]
