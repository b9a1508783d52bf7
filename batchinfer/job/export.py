"""One output file for each input shard, in input order: what downstream programs want of a run.

Units are read once, in the order of the input, and a shard's file is closed when the next shard begins: memory is bounded by a
row group. Everything is written into a folder with a temporary name, which gets its own when all is there: an export that was
killed leaves nothing under that name, and the next one clears away what it left beside it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import decimal
import itertools
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.config import ConfigError, ExportConfig
from batchinfer.data.schema import num_rows
from batchinfer.data.writer import DamagedFile, file_hash, read_footer, row_groups
from batchinfer.job.manifest import Manifest
from batchinfer.job.process import start_time
from batchinfer.job.rundir import RunDir
from batchinfer.publish import sync_folder, temporary

GROUP_ROWS, GROUP_BYTES = 1 << 16, 64 << 20  # a row group is closed at the first of them
BATCH_ROWS = 1024


class ExportFailed(Exception):
    """The files do not hold what the manifest says. Nothing has been exported."""


@dataclasses.dataclass
class Exported:
    """What an export has written."""

    files: int = 0
    rows: int = 0  # of the input
    samples: int = 0  # of the output


def export(run_dir: RunDir, dest: Path, asked: ExportConfig) -> Exported:
    """Writes `dest`, which must be absent or an empty folder: a file under each shard's relative path.

    While a retry is under way, what counted when the export began is exported. Raises ConfigError for a wrong destination, rows
    that are missing, or a damaged file; ExportFailed; OSError.
    """
    manifest = Manifest.load(run_dir)
    done = run_dir.done_units()
    _require_place(run_dir, dest)
    _require_rows(run_dir, manifest, done, asked)
    names = _names(manifest, asked)
    exported = Exported()
    with _appearing(dest) as folder:
        units = _Units(run_dir, manifest, done)
        for path, pieces in itertools.groupby(units.pieces(), lambda piece: piece[0]):
            with _opened(folder / names[path], units.schema, manifest, asked) as sink:
                _write(sink, path, (batch for _, batch in pieces), units, exported)
        for shard in manifest.shards:
            if shard.num_rows == 0:
                with _opened(folder / names[shard.path], units.schema, manifest, asked):
                    exported.files += 1
        units.require_all(exported)
    return exported


def _require_place(run_dir: RunDir, dest: Path) -> None:
    if dest.resolve().is_relative_to(run_dir.root.resolve()):
        raise ConfigError(f"{dest}: lies inside the run; choose a folder outside {run_dir.root}")
    if dest.is_dir() and any(dest.iterdir()):
        raise ConfigError(f"{dest}: is not empty; choose a new folder, or remove what is in it")
    if os.path.lexists(dest) and not dest.is_dir():
        raise ConfigError(f"{dest}: is a file; choose a new folder")


def _require_rows(run_dir: RunDir, manifest: Manifest, done: dict[int, int], asked: ExportConfig) -> None:
    if not done:
        raise ConfigError(f"{run_dir.root}: no row is committed, so there is nothing to export")
    rows = sum(num_rows(unit) for number, unit in enumerate(manifest.units) if number not in done)
    if rows and not asked.incomplete:
        raise ConfigError(
            f"{run_dir.root}: {rows:,} rows are missing; finish them with: python -m batchinfer resume {run_dir.root}, or export "
            "what is there with export.incomplete=true"
        )


def _names(manifest: Manifest, asked: ExportConfig) -> dict[str, str]:
    """Shard path to file name. Raises ConfigError when two shards would share one."""
    paths = [shard.path for shard in manifest.shards]
    if asked.format == "parquet":
        return {path: path for path in paths}
    names = {path: f"{path.removesuffix('.parquet')}.jsonl" for path in paths}
    if len(set(names.values())) < len(names):
        raise ConfigError("export.format=jsonl: two shards differ only in the ending .parquet, and would share a file")
    return names


class _Units:
    """The committed units in input order, as pieces of one shard each."""

    def __init__(self, run_dir: RunDir, manifest: Manifest, done: dict[int, int]):
        self._run_dir, self._done, self._shard = run_dir, sorted(done.items()), manifest.config.output.prefix + "shard"
        self.prefix = manifest.config.output.prefix
        self.planned: Counter[str] = Counter()  # rows of each shard
        for unit in done:
            for r in manifest.units[unit]:
                self.planned[manifest.shards[r.shard].path] += r.stop - r.start
        first, generation = self._done[0]
        self.schema = run_dir.read_committed(first, generation, pq.read_schema).remove_metadata()

    def pieces(self) -> Iterator[tuple[str, pa.RecordBatch]]:
        for unit, generation in self._done:
            with self._run_dir.read_committed(unit, generation, _open_whole) as file:
                for group in range(file.metadata.num_row_groups):
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                        yield from self._by_shard(batch)

    def _by_shard(self, batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
        runs, start = pc.run_end_encode(batch.column(self._shard)), 0
        for stop, shard in zip(runs.run_ends.to_pylist(), runs.values.to_pylist(), strict=True):
            yield shard, batch.slice(start, stop - start)
            start = stop

    def require_all(self, exported: Exported) -> None:
        if exported.rows != self.planned.total():
            raise ExportFailed(f"{exported.rows:,} rows were written of {self.planned.total():,}; `verify` says more")


def _open_whole(path: Path) -> pq.ParquetFile:
    """The open file stays readable when a retry moves it away."""
    if file_hash(path) != read_footer(path).file_hash:
        raise DamagedFile(f"{path}: its bytes are not those that were written, so it is not exported; see `verify`")
    return pq.ParquetFile(path)


def _write(sink: _Sink, shard: str, batches: Iterator[pa.RecordBatch], units: _Units, exported: Exported) -> None:
    """All pieces of one shard, while their rows and samples only go up."""
    last, rows = (-1, 0), 0
    for batch in batches:
        numbers, samples = (batch.column(units.prefix + name).to_numpy() for name in ("row", "sample"))
        keys = np.stack([np.append(last[0], numbers), np.append(last[1], samples)])
        step = np.diff(keys)
        if not np.all((step[0] > 0) | ((step[0] == 0) & (step[1] > 0))):
            raise ExportFailed(f"rows of {shard} are out of order or doubled; `verify` says which")
        last = (int(numbers[-1]), int(samples[-1]))
        rows += int(np.count_nonzero(step[0]))
        exported.samples += batch.num_rows
        sink.write(batch)
    if rows != units.planned[shard]:
        raise ExportFailed(f"{rows:,} rows of {shard} are there, it should be {units.planned[shard]:,}; `verify` says which")
    exported.rows += rows
    exported.files += 1


@contextlib.contextmanager
def _appearing(dest: Path) -> Iterator[Path]:
    """A folder that gets the name `dest` when the block has ended well, and is gone otherwise."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(dest)
    folder = temporary(dest)
    os.mkdir(folder)
    try:
        yield folder
        os.rename(folder, dest)  # takes the place of an empty folder, and of no other
        sync_folder(dest.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear_leftovers(dest: Path) -> None:
    """What killed exports to the same place left, of this host: others may still be at work."""
    host = socket.gethostname()[:40]
    name = re.compile(re.escape(f".{dest.name}.{host}-") + r"(\d+)-[0-9a-f]{8}\.tmp")
    for path in dest.parent.iterdir():
        match = name.fullmatch(path.name)
        if match and start_time(int(match[1])) is None:
            shutil.rmtree(path, ignore_errors=True)


class _Sink(Protocol):
    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def _opened(path: Path, schema: pa.Schema, manifest: Manifest, asked: ExportConfig) -> Iterator[_Sink]:
    """A new file, whole and on disk at the end of the block. OSErrors name it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "xb") as file:
            sink: _Sink = _Lines(file) if asked.format == "jsonl" else _Parquet(file, schema, manifest)
            with contextlib.closing(sink):
                yield sink
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class _Parquet:
    """Row groups of a useful size, with the output's schema and the run's compression."""

    def __init__(self, file: IO[bytes], schema: pa.Schema, manifest: Manifest):
        compression = manifest.config.output.compression
        codec = "NONE" if compression == "none" else compression
        self._writer = pq.ParquetWriter(file, schema, compression=codec, use_compliant_nested_type=False)
        self._writer.add_key_value_metadata({"batchinfer.fingerprint": manifest.fingerprint})
        self._schema, self._rows, self._bytes = schema, 0, 0
        self._pending: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        self._pending.append(batch)
        self._rows, self._bytes = self._rows + batch.num_rows, self._bytes + batch.nbytes
        if self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            for group in row_groups(pa.Table.from_batches(self._pending, self._schema)):
                self._writer.write_table(group)
        self._pending, self._rows, self._bytes = [], 0, 0


class _Lines:
    """A JSON object for each row. What JSON does not know: bytes become base64, times ISO 8601, numbers that are none null."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def write(self, batch: pa.RecordBatch) -> None:
        try:
            rows = batch.to_pylist()
        except ValueError as error:  # text that is not UTF-8, times of nanoseconds
            raise ConfigError(f"export.format=jsonl: a value has no JSON ({error}); use export.format=parquet") from error
        for row in rows:
            self._file.write(_json_line(row))

    def close(self) -> None:
        pass


def _json_line(row: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_without_nan(row), ensure_ascii=False, default=_plain)
    return text.encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
