"""Is every sample of every input row there exactly once, and is every file what its writer wrote or read?

Trusts names and manifest, nothing else. Three depths: `quick` compares bytes with the hash that each file's footer has, the full
check also decodes every row and reads the inputs again, `deep` also hashes the weights.

One completions file is in memory at a time. Each problem is one line that names the file and the first row at fault.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.data.columns import columns_to_read
from batchinfer.data.prompts import samples_asked
from batchinfer.data.reader import UnitReader
from batchinfer.data.schema import BLOCK_ROWS, SCHEMA_VERSION, Unit, UnitFooter, num_rows
from batchinfer.data.writer import (
    block_hashes,
    file_hash,
    logical_hash,
    logical_hashes,
    our_fields,
    read_footer,
    read_rows,
    repeat_rows,
)
from batchinfer.job.manifest import NOT_NULL, Manifest
from batchinfer.job.origins import Origins
from batchinfer.job.rundir import RunDir, parse_completion

Key = tuple[str, int, int]  # shard, row, sample
CHANGED_BYTES = "its bytes are not those that were written, though no row shows it: a header, a statistic or the footer differs"
TIMES = {2: "twice", 3: "three times"}


def verify(run_dir: RunDir, quick: bool = False, deep: bool = False) -> list[str]:
    """Problems of a run, one sentence each; empty when every sample of every row is committed exactly once, whole and unchanged.

    Inputs and the checkpoint are compared where they can still be reached. Raises ConfigError when there is no run.
    """
    manifest = Manifest.load(run_dir)
    origins = Origins(run_dir, manifest)
    problems = [*origins.problems(deep), *_Verifier(run_dir, manifest, origins.unchanged, quick).problems()]
    return list(dict.fromkeys(problems))


class _Verifier:
    """Of `completions/`. `unchanged`: the shards that can be compared with."""

    def __init__(self, run_dir: RunDir, manifest: Manifest, unchanged: Set[int], quick: bool):
        self._run_dir, self._manifest, self._unchanged, self._quick = run_dir, manifest, unchanged, quick
        self._fingerprint = manifest.fingerprint
        self._prefix = manifest.config.output.prefix
        inputs = [_without_item_names(line.removesuffix(NOT_NULL)) for line in manifest.request["input.schema"]]
        kept = [next(line for line in inputs if line.startswith(f"{name}: ")) for name in manifest.columns]
        self._columns = kept + [_describe(field) for field in our_fields(manifest.config)]
        self._reader: UnitReader | None = None

    def problems(self) -> Iterator[str]:
        done = self._run_dir.done_units()
        units = self._manifest.units
        yield from self._foreign_files()
        missing = [unit for unit in range(len(units)) if unit not in done]
        if missing:
            rows = sum(num_rows(units[unit]) for unit in missing)
            yield f"{'unit' if len(missing) == 1 else 'units'} {_ranges(missing)} missing: {rows:,} of {self._total():,} rows"
        for unit in sorted(done.keys() & set(range(len(units)))):
            for problem in self._run_dir.read_committed(unit, done[unit], partial(self._file_problems, unit, done[unit])):
                yield f"completions/{self._run_dir.completion(unit, done[unit]).name}: {problem}"

    def _total(self) -> int:
        return sum(num_rows(unit) for unit in self._manifest.units)

    def _foreign_files(self) -> Iterator[str]:
        for name in sorted(os.listdir(self._run_dir.completions)):
            parsed = parse_completion(name)
            if parsed is None and not name.startswith("."):  # dotted: temporaries of killed writers, and NFS's own
                yield f"completions/{name}: not the name of a completions file"
            elif parsed is not None and parsed[0] >= len(self._manifest.units):
                yield f"completions/{name}: this run has no unit {parsed[0]}, only {len(self._manifest.units):,} units"

    def _file_problems(self, unit: int, generation: int, path: Path) -> list[str]:
        """Raises FileNotFoundError."""
        try:
            footer = read_footer(path)
            is_whole = file_hash(path) == footer.file_hash
            table = None if self._quick else _read(path)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            return [f"cannot be read, torn or damaged ({_one_line(error.__cause__ or error)})"]
        found = list(self._name_problems(footer, unit, generation))
        if table is not None:
            found += self._content_problems(footer, table, unit)
        return found if found or is_whole else [CHANGED_BYTES]

    def _name_problems(self, footer: UnitFooter, unit: int, generation: int) -> Iterator[str]:
        """Does the file belong where it lies? Files of other runs, or under each other's names, do not."""
        rows = num_rows(self._manifest.units[unit])
        yield from _differing(
            footer,
            schema_version=SCHEMA_VERSION,
            unit=unit,
            generation=generation,
            rows=rows,
            fingerprint=self._fingerprint,
        )

    def _content_problems(self, footer: UnitFooter, table: pa.Table, unit: int) -> Iterator[str]:
        columns = [_describe(field) for field in table.schema]
        if columns != self._columns:
            yield _column_problem(columns, self._columns)
            return
        content, found = logical_hashes(table)
        if content != footer.content_hash:
            yield f"its rows are not those that were written: {self._difference(footer, table, found)}"
        yield from self._total_problems(footer, table)
        yield from self._row_problems(footer, table, self._manifest.units[unit])

    def _difference(self, footer: UnitFooter, table: pa.Table, found: Mapping[str, str]) -> str:
        """Which columns, and between which rows, as far as the footer's smaller hashes tell. `found`: the columns' hashes now."""
        columns = [repr(name) for name in table.column_names if footer.column_hashes.get(name) != found[name]]
        if not columns:
            return "the content hash differs"
        what = f"columns {', '.join(columns)} differ" if len(columns) > 1 else f"column {columns[0]} differs"
        blocks = [block for block, pair in enumerate(zip_longest(block_hashes(table), footer.block_hashes)) if len(set(pair)) > 1]
        if not blocks or blocks[-1] * BLOCK_ROWS >= table.num_rows:  # there are fewer rows than were written
            return what
        start = blocks[0] * BLOCK_ROWS
        keys = self._keys(table.slice(start, (blocks[-1] + 1) * BLOCK_ROWS - start))
        (first_shard, first, _), (last_shard, last, _) = keys[0], keys[-1]
        return f"{what} between row {first} of shard {first_shard} and row {last} of shard {last_shard}"

    def _total_problems(self, footer: UnitFooter, table: pa.Table) -> Iterator[str]:
        errors = Counter(table[self._prefix + "error"].drop_null().to_pylist())
        yield from _differing(
            footer,
            samples=table.num_rows,
            prompt_tokens=self._sum(table, "num_prompt_tokens"),
            completion_tokens=self._sum(table, "num_completion_tokens"),
            errors=dict(errors),
        )

    def _sum(self, table: pa.Table, name: str) -> int:
        return pc.sum(table[self._prefix + name]).as_py() or 0

    def _row_problems(self, footer: UnitFooter, table: pa.Table, unit: Unit) -> Iterator[str]:
        """Compares rows and samples with the unit and its input, which is read again unless it has been moved away."""
        inputs, complaint = None, None
        try:
            inputs = self._inputs(unit)
        except (RuntimeError, OSError, pa.ArrowException) as error:  # InputChanged, damaged pages, a file that is no Parquet
            complaint = f"its input cannot be compared: {_one_line(error)}"
        found = self._keys(table)
        samples = self._expected_samples(unit, inputs, table)
        expected = [(shard, row, k) for (shard, row), count in samples.items() for k in range(count)]
        misplaced = list(_key_problems(found, expected))
        yield from misplaced or ([complaint] if complaint else [])
        if not misplaced and inputs is not None:
            yield from self._input_problems(footer, table, inputs, list(samples.values()), self._name(unit))

    def _inputs(self, unit: Unit) -> pa.Table | None:
        if not {r.shard for r in unit} <= self._unchanged:  # said once for each shard, not for each unit
            return None
        return self._open_reader(Path(self._manifest.input_root), unit).read(unit)

    def _keys(self, table: pa.Table) -> list[Key]:
        columns = (table[self._prefix + name].to_pylist() for name in ("shard", "row", "sample"))
        return list(zip(*columns, strict=True))

    def _expected_samples(self, unit: Unit, inputs: pa.Table | None, table: pa.Table) -> dict[tuple[str, int], int]:
        """How many samples each row of the unit should have: what was asked, but one where the row itself is an error.

        Where the rows say how many and cannot be read any more, as many as there are: then only gaps and doubles show.
        """
        shards, config = self._manifest.shards, self._manifest.config
        rows = [(shards[r.shard].path, row) for r in unit for row in range(r.start, r.stop)]
        asked = [config.sampling.n] * len(rows)
        if config.input.sampling_column is not None:
            if inputs is not None:
                asked = samples_asked(config.sampling, inputs.column(config.input.sampling_column))
            else:
                there = Counter((shard, row) for shard, row, _ in set(self._keys(table)))
                asked = [max(1, there[row]) for row in rows]
        failed = self._failed_rows(table)
        return {row: 1 if row in failed else count for row, count in zip(rows, asked, strict=True)}

    def _failed_rows(self, table: pa.Table) -> set[tuple[str, int]]:
        """Rows that are errors themselves, rather than a sample of them: none of their prompt went to the engine."""
        error, prompt = table[self._prefix + "error"], table[self._prefix + "num_prompt_tokens"]
        failed = pc.and_(pc.is_valid(error), pc.equal(prompt, 0)).to_pylist()
        return {(shard, row) for (shard, row, _), is_failed in zip(self._keys(table), failed, strict=True) if is_failed}

    def _input_problems(
        self, footer: UnitFooter, table: pa.Table, inputs: pa.Table, samples: list[int], name: str
    ) -> Iterator[str]:
        if logical_hash(inputs) != footer.input_hash:
            yield f"its input is not what was read when it was made: rows of {name} have changed"
        kept = self._manifest.columns
        if kept and logical_hash(repeat_rows(inputs.select(kept), samples)) != logical_hash(table.select(kept)):
            yield f"its input columns differ from the input: {name}"

    def _open_reader(self, root: Path, unit: Unit) -> UnitReader:
        if self._reader is None:
            manifest = self._manifest
            schema = pq.read_schema(root / manifest.shards[unit[0].shard].path)
            columns = columns_to_read(manifest.config.input, schema, manifest.columns)
            self._reader = UnitReader(root, manifest.shards, columns)
        return self._reader

    def _name(self, unit: Unit) -> str:
        return ", ".join(dict.fromkeys(self._manifest.shards[r.shard].path for r in unit))


def _key_problems(found: list[Key], expected: list[Key]) -> Iterator[str]:
    """At most one line for each way of being wrong. `expected` has no duplicates."""
    if found == expected:
        return
    counts, wanted = Counter(found), set(expected)
    doubled = [(key, f"appears {TIMES.get(n, f'{n} times')}") for key, n in counts.items() if n > 1]
    missing = [(key, "is missing") for key in expected if key not in counts]
    foreign = [(key, "does not belong to this unit") for key in counts if key not in wanted]
    if not (doubled or missing or foreign):
        misplaced = [(key, "is out of order") for key, right in zip(found, expected, strict=True) if key != right]
        yield from _first(misplaced)
    for problems in (doubled, missing, foreign):
        yield from _first(problems)


def _first(problems: list[tuple[Key, str]]) -> Iterator[str]:
    if problems:
        (shard, row, sample), what = problems[0]
        more = f" (and so for {len(problems) - 1:,} more rows)" if len(problems) > 1 else ""
        yield f"row {row} of shard {shard}{f', sample {sample},' if sample else ''} {what}{more}"


def _column_problem(found: list[str], expected: list[str]) -> str:
    for name, want in zip(found, expected, strict=False):
        if name != want:
            return f"column {name!r} stands where {want!r} belongs"
    if len(found) < len(expected):
        return f"column {expected[len(found)]!r} is missing"
    return f"column {found[len(expected)]!r} does not belong"


def _read(path: Path) -> pa.Table:
    """All rows of a file; when that fails, with the names of the columns that cannot be read."""
    with pq.ParquetFile(path) as file:
        try:
            return read_rows(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            damaged = [name for name in file.schema_arrow.names if not _is_readable(file, name)]
            if not damaged:
                raise
            raise ValueError(f"column {', '.join(map(repr, damaged))}: {error}") from None


def _is_readable(file: pq.ParquetFile, column: str) -> bool:
    try:
        read_rows(file, [column])
    except (OSError, ValueError, pa.ArrowException):
        return False
    return True


def _differing(footer: UnitFooter, **expected: Any) -> Iterator[str]:
    for name, value in expected.items():
        if getattr(footer, name) != value:
            yield f"its footer says {name} {getattr(footer, name)}, it should be {value}"


def _describe(field: pa.Field) -> str:
    return _without_item_names(f"{field.name}: {field.type}")


def _without_item_names(column: str) -> str:
    """Parquet calls a list's items `element` whatever Arrow called them before."""
    return re.sub(r"list<\w+: ", "list<", column)


def _ranges(numbers: Iterable[int]) -> str:
    """0, 2-5, 9"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())
