"""Rows of a unit that killed replicas, run apart from all others until it is known which of them do it (`job.narrowing`).

What is about to run is written down before it is so much as prepared; that it passed, when nothing of it is left in the engine.
What has passed is saved (`data.partials`), so that it is not made again when a later set kills.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from batchinfer.data.partials import Key, save_partial
from batchinfer.data.prompts import PreparedRow
from batchinfer.data.results import RowResult
from batchinfer.job.attempts import add_attempt, read_attempts
from batchinfer.job.manifest import Manifest
from batchinfer.job.narrowing import TIMES, Attempt, Event, Findings, find
from batchinfer.job.rundir import RunDir

log = logging.getLogger(__name__)


class Trial:
    """One suspect unit in the hands of one replica."""

    def __init__(self, isolation: Isolation, unit: int, generation: int, findings: Findings) -> None:
        self._isolation, self._unit, self._generation, self._findings = isolation, unit, generation, findings

    def next_set(self) -> tuple[int, ...] | None:
        """The rows to be run apart next; None when it is known of each what it does."""
        return self._findings.sets[0] if self._findings.sets else None

    def begin(self, rows: tuple[int, ...]) -> None:
        log.warning("unit %d killed %d replicas: %d of its rows run apart", self._unit, self._findings.deaths, len(rows))
        self._add(Attempt(Event.BEGUN, self._isolation.replica, rows))

    def passed(self, rows: tuple[int, ...], epoch: int, results: Mapping[Key, RowResult]) -> None:
        """`results`: of the whole unit, as far as they are there."""
        self._isolation.save(self._unit, epoch, results)
        self._add(Attempt(Event.PASSED, self._isolation.replica, rows))

    @property
    def condemned(self) -> dict[int, PreparedRow]:
        """Error rows in place of those that killed."""
        return {row: _condemned(reason) for row, reason in self._findings.condemned.items()}

    def _add(self, attempt: Attempt) -> None:
        add_attempt(self._isolation.run_dir, self._unit, self._generation, attempt)
        self._findings.add(attempt)


class Isolation:
    """Knows which units of a run are suspect. `may_save`: whether what is saved could be made use of; it may raise."""

    def __init__(self, run_dir: RunDir, manifest: Manifest, replica: str, may_save: Callable[[], bool]) -> None:
        self.run_dir, self.replica = run_dir, replica
        self._fingerprint, self._may_save = manifest.fingerprint, may_save

    def trial(self, unit: int, generation: int, rows: Sequence[int]) -> Trial | None:
        """None: the unit is not suspect. `rows`: those to be computed."""
        findings = find(read_attempts(self.run_dir, unit, generation), rows)
        return Trial(self, unit, generation, findings) if findings.is_suspect else None

    def save(self, unit: int, epoch: int, results: Mapping[Key, RowResult]) -> None:
        """Whatever keeps it from being saved, the rows are only made again."""
        try:
            if results and self._may_save():
                save_partial(self.run_dir, unit, epoch, self._fingerprint, results)
        except (OSError, pa.ArrowException) as error:
            log.warning("what passed of unit %d is not saved: %s", unit, error)


def _condemned(reason: str) -> PreparedRow:
    told = f"alone in the engine it ended its replica {TIMES} times; the last one {reason}"
    return PreparedRow(None, None, (), "killed_replica", told, 0)
