"""The next generation of a unit: which rows of the one before a retry computes anew, and how both become one table.

All other rows are copied as they stand in the file, value for value, after its hash has shown that they are what was written.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.reader import InputChanged
from batchinfer.data.writer import DamagedFile, file_hash, logical_hash, read_footer, read_rows
from batchinfer.job.retry import Goal
from batchinfer.job.rundir import RunDir

Keys = Sequence[tuple[str, int]]  # (shard, row) of each input row of a unit


@dataclass(frozen=True)
class Earlier:
    """The generation that is replaced. `wanted`: by an input row's place in the unit, its samples to be computed anew; None: all
    of them, as the row itself is the error."""

    table: pa.Table
    prefix: str
    wanted: Mapping[int, Sequence[int] | None]
    prompt_tokens: Mapping[int, int]  # of the wanted rows that have some

    def merged(self, new: pa.Table, keys: Keys) -> pa.Table:
        """The unit with the rows of `new` in place of those that were wanted, in input order."""
        places = {key: index for index, key in enumerate(keys)}
        old = pa.Table.from_arrays(self.table.columns, schema=new.schema)
        rows = {}
        for table in (old, new):
            for position, (shard, row, sample) in enumerate(_names(table, self.prefix)):
                rows[places[shard, row], sample] = (table, position)
        return _picked([rows[place] for place in sorted(rows)])


class Generations:
    """Which generation of each unit is to be made: 0, or a retry's goal."""

    def __init__(self, run_dir: RunDir, goals: Mapping[int, Goal], prefix: str):
        self._run_dir, self._goals, self._prefix = run_dir, goals, prefix

    def of(self, unit: int) -> int:
        return self._goals[unit].generation if unit in self._goals else 0

    def earlier(self, unit: int, keys: Keys, inputs: pa.Table) -> Earlier | None:
        """What a retry begins from; None for a unit that is made for the first time.

        Raises DamagedFile when it is not what was written, InputChanged when its input is not what was read for it.
        """
        goal = self._goals.get(unit)
        if goal is None:
            return None

        def load(path: Path) -> Earlier:
            table = _load(path, inputs)
            return Earlier(table, self._prefix, *_wanted(table, keys, goal, self._prefix))

        return self._run_dir.read_committed(unit, goal.generation - 1, load)


def pick_rows(table: pa.Table, indices: Sequence[int]) -> pa.Table:
    """Some rows of a table, without a copy and whatever their types."""
    return _picked([(table, index) for index in indices])


def _picked(rows: Sequence[tuple[pa.Table, int]]) -> pa.Table:
    """Rows of tables with one schema, stretch by stretch."""
    pieces = []
    for _, stretch in itertools.groupby(enumerate(rows), lambda item: (id(item[1][0]), item[1][1] - item[0])):
        members = [row for _, row in stretch]
        table, start = members[0]
        pieces.append(table.slice(start, len(members)))
    return pa.concat_tables(pieces)


def _load(path: Path, inputs: pa.Table) -> pa.Table:
    footer = read_footer(path)
    if file_hash(path) != footer.file_hash:
        raise DamagedFile(f"{path}: its bytes are not those that were written, so its rows are not copied; see `verify`")
    if logical_hash(inputs) != footer.input_hash:
        raise InputChanged(f"{path}: its input has changed since it was read, so its error rows cannot be run again")
    with pq.ParquetFile(path) as file:
        return read_rows(file)


def _names(table: pa.Table, prefix: str) -> list[tuple[str, int, int]]:
    columns = (table[prefix + name].to_pylist() for name in ("shard", "row", "sample"))
    return list(zip(*columns, strict=True))


def _wanted(table: pa.Table, keys: Keys, goal: Goal, prefix: str) -> tuple[dict[int, Sequence[int] | None], dict[int, int]]:
    """`Earlier.wanted` and `Earlier.prompt_tokens`."""
    places = {key: index for index, key in enumerate(keys)}
    errors, prompts = (table[prefix + name].to_pylist() for name in ("error", "num_prompt_tokens"))
    wanted: dict[int, list[int] | None] = {}
    prompt_tokens: dict[int, int] = {}
    for (shard, row, sample), error, tokens in zip(_names(table, prefix), errors, prompts, strict=True):
        if not goal.includes(error):
            continue
        place = places[shard, row]
        if tokens == 0:  # it never became a prompt, so nobody knows yet how many samples it has
            wanted[place] = None
        else:
            samples = wanted.setdefault(place, [])
            assert samples is not None, "a row that is an error itself stands alone"
            samples.append(sample)
            prompt_tokens[place] = tokens
    return dict(wanted), prompt_tokens
