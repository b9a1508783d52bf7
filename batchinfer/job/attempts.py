"""What was tried with units that killed replicas: `attempts/<unit>.<number>.json`, each published once and never changed.

Deaths are recorded by the node of the replica that died, for every unit that it held; what is run apart by the worker that does
it. A replica that stopped, or went down with its node, leaves nothing. Attempts are of one generation: a retry begins without.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from batchinfer.job.claims import units_of
from batchinfer.job.narrowing import SUSPECT_AFTER, Attempt, Event
from batchinfer.job.retry import goals
from batchinfer.job.rundir import RunDir, parse_attempt
from batchinfer.publish import Published, publish_bytes


@dataclass(frozen=True)
class Gain:
    """What a death taught. `recorded`: it may be that of a unit; `suspected`: a unit has become suspect by it; `apart`: it came
    when rows ran apart; `passed`: others had passed before."""

    recorded: bool = False
    suspected: bool = False
    apart: bool = False
    passed: bool = False

    @property
    def of_rows(self) -> bool:
        """It is by rows, as far as anybody can tell, and says nothing of the node."""
        return self.suspected or self.apart


def read_attempts(run_dir: RunDir, unit: int, generation: int) -> list[Attempt]:
    """In the order in which they were published."""
    numbers = run_dir.attempt_numbers(unit)
    found = (json.loads(run_dir.attempt(unit, number).read_bytes()) for number in numbers)
    return [_attempt(raw) for raw in found if raw["generation"] == generation]


def add_attempt(run_dir: RunDir, unit: int, generation: int, attempt: Attempt) -> None:
    """Durable when it returns. Raises OSError."""
    raw = {
        "generation": generation,
        "event": attempt.event,
        "replica": attempt.replica,
        "rows": attempt.rows,
        "reason": attempt.reason,
    }
    number = max(run_dir.attempt_numbers(unit), default=-1) + 1
    while publish_bytes(run_dir.attempt(unit, number), json.dumps(raw).encode()) is Published.LOST:
        number += 1


def record_death(run_dir: RunDir, replica: str, reason: str, held: Collection[int] = ()) -> Gain:
    """A death of its own accord, as an attempt with each unit that the replica held. Raises OSError.

    `held`: what it said itself before it gave it back.
    """
    goal = {unit: goal.generation for unit, goal in goals(run_dir).items()}
    units = sorted({*units_of(run_dir, replica, goal), *held})
    gains = [_record(run_dir, unit, goal.get(unit, 0), replica, reason) for unit in units]
    return Gain(
        recorded=bool(gains),
        suspected=any(gain.suspected for gain in gains),
        apart=any(gain.apart for gain in gains),
        passed=any(gain.passed for gain in gains),
    )


def _record(run_dir: RunDir, unit: int, generation: int, replica: str, reason: str) -> Gain:
    before = read_attempts(run_dir, unit, generation)
    add_attempt(run_dir, unit, generation, Attempt(Event.DIED, replica, reason=reason))
    deaths = 1 + sum(attempt.event is Event.DIED for attempt in before)
    own = [attempt.event for attempt in before if attempt.replica == replica]
    return Gain(True, deaths == SUSPECT_AFTER, own[-1:] == [Event.BEGUN], Event.PASSED in own)


def doubtful_units(run_dir: RunDir) -> Sequence[int]:
    """Units that killed a replica at least once, in whatever generation."""
    parsed = (parse_attempt(name) for name in os.listdir(run_dir.attempts))
    return sorted({found[0] for found in parsed if found is not None})


def _attempt(raw: dict[str, object]) -> Attempt:
    rows = raw["rows"]
    assert isinstance(rows, list)
    return Attempt(Event(str(raw["event"])), str(raw["replica"]), tuple(rows), str(raw["reason"]))
