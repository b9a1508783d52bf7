"""What `retry` freezes: the units that had error rows, the generation that each is to reach, and what is left of that.

A retry is `retries/01.json`, published once. It belongs to the run and not to a submission, so that whoever works on the run, a
`resume` or a worker started by hand too, finds the same goals. Until a unit has reached its goal, the generation before counts.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchinfer.config import ConfigError, show
from batchinfer.data.schema import ERROR_CODES, OF_THE_ROW, UnitFooter
from batchinfer.data.writer import read_footer
from batchinfer.job.manifest import Manifest
from batchinfer.job.rundir import RunDir
from batchinfer.publish import Published, publish_bytes


@dataclass(frozen=True)
class Goal:
    """What is to become of a unit: `generation`, in which the errors of `codes` (none: every error) are computed anew."""

    generation: int
    codes: tuple[str, ...]
    rows: int  # of the output, which are such errors in the generation before

    def includes(self, code: str | None) -> bool:
        return code is not None and (not self.codes or code in self.codes)


def goals(run_dir: RunDir) -> dict[int, Goal]:
    """The goal of every unit that a retry was asked for; of several retries the last one's."""
    found: dict[int, Goal] = {}
    for number in _numbers(run_dir):
        raw = json.loads(run_dir.retry_json(number).read_bytes())
        found.update({unit: Goal(generation, tuple(raw["codes"]), rows) for unit, generation, rows in raw["units"]})
    return found


def unfinished(run_dir: RunDir) -> dict[int, Goal]:
    """Of these, the goals that are not reached."""
    found = goals(run_dir)
    done = run_dir.done_units() if found else {}
    return {unit: goal for unit, goal in found.items() if done.get(unit, -1) < goal.generation}


def is_complete(run_dir: RunDir) -> bool:
    """Every unit is committed, and as often as retries asked for."""
    return len(run_dir.done_units()) >= len(Manifest.load(run_dir).units) and not unfinished(run_dir)


def begin(run_dir: RunDir, codes: Sequence[str]) -> dict[int, Goal]:
    """Freezes a retry of all error rows of `codes` (none: of any), or takes up one that is not finished. Empty: no such rows.

    Raises ConfigError for an unknown code, for a run of which rows are missing, and beside an unfinished retry of other codes.
    """
    _check(codes)
    if len(run_dir.done_units()) < len(Manifest.load(run_dir).units):
        raise ConfigError(f"{run_dir.root}: rows are missing; finish them first: python -m batchinfer resume {run_dir.root}")
    while True:
        number = 1 + max(_numbers(run_dir), default=0)  # before all looking: whoever is faster takes this very number
        left = unfinished(run_dir)
        if left:
            return _joined(run_dir, left, codes)
        wanted = _wanted(run_dir, codes)
        if not wanted or _freeze(run_dir, number, codes, wanted):
            return wanted


def describe(run_dir: RunDir, wanted: Mapping[int, Goal]) -> str:
    """What is going to happen, and what cannot come of it."""
    if not wanted:
        return f"{run_dir.root}: no such error row, so nothing is run again"
    done = run_dir.done_units()
    counts: Counter[str] = Counter()
    for unit, goal in wanted.items():
        errors = run_dir.read_committed(unit, done[unit], read_footer).errors
        counts.update({code: count for code, count in errors.items() if goal.includes(code)})
    by_code = ", ".join(f"{code} {count:,}" for code, count in sorted(counts.items()))
    text = f"retry: {counts.total():,} error rows ({by_code}) in {len(wanted):,} units"
    same = [code for code in sorted(counts) if code in OF_THE_ROW]
    return text + (f"; {', '.join(same)}: for such rows the same comes out again, unless the program has changed" if same else "")


def errors_in(run_dir: RunDir, wanted: Mapping[int, Goal]) -> int:
    """How many output rows of these units are still errors of the codes that their goals name."""
    done = run_dir.done_units()
    return sum(_errors(run_dir.read_committed(unit, done[unit], read_footer), goal) for unit, goal in wanted.items())


def _numbers(run_dir: RunDir) -> list[int]:
    """Of the retries so far."""
    return sorted(int(path.stem) for path in run_dir.retries.glob("[0-9]*.json"))


def _check(codes: Sequence[str]) -> None:
    for code in codes:
        if code not in ERROR_CODES:
            close = difflib.get_close_matches(code, ERROR_CODES, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"{show('retry.codes', list(codes))}: no error code {code!r}; {hint}codes: {', '.join(ERROR_CODES)}"
            )


def _joined(run_dir: RunDir, left: dict[int, Goal], codes: Sequence[str]) -> dict[int, Goal]:
    frozen = next(iter(left.values())).codes
    if codes and set(codes) != set(frozen):
        raise ConfigError(
            f"{show('retry.codes', list(codes))}: an earlier retry, {show('retry.codes', list(frozen))}, is not finished; "
            f"finish it with: python -m batchinfer resume {run_dir.root}"
        )
    return left


def _wanted(run_dir: RunDir, codes: Sequence[str]) -> dict[int, Goal]:
    wanted = {}
    for unit, generation in sorted(run_dir.done_units().items()):
        goal = Goal(generation + 1, tuple(codes), 0)
        rows = _errors(run_dir.read_committed(unit, generation, read_footer), goal)
        if rows:
            wanted[unit] = Goal(goal.generation, goal.codes, rows)
    return wanted


def _errors(footer: UnitFooter, goal: Goal) -> int:
    return sum(count for code, count in footer.errors.items() if goal.includes(code))


def _freeze(run_dir: RunDir, number: int, codes: Sequence[str], wanted: Mapping[int, Goal]) -> bool:
    """False when somebody else froze a retry first."""
    run_dir.retries.mkdir(exist_ok=True)
    record = {"codes": list(codes), "units": [[unit, goal.generation, goal.rows] for unit, goal in wanted.items()]}
    return publish_bytes(run_dir.retry_json(number), json.dumps(record).encode()) is Published.WON
