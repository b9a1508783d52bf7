"""Reading input: which shards there are (footers only), and the rows of one unit at a time in bounded memory.

Both halves look at a file the same way, through `_read_footer_bytes`: a shard is known by its size and a digest of its Parquet
footer, so the planner's view and the worker's view of a file can be compared without reading it.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.config import ConfigError
from batchinfer.data.schema import RowRange, Shard, Unit

_MAGIC = b"PAR1"
_TAIL = 64 << 10  # one read of this size holds most footers
_SCAN_THREADS = 16  # footers wait for the file system, not for the processor
_BATCH_ROWS = 256  # rows decoded at once: the cursor's memory, beside the unit itself
_BUFFER_BYTES = 1 << 20  # column chunks are streamed through buffers of this size, never held whole
_OPEN_FILES = 4  # cursors kept open, so that units that alternate between shards do not start over


class InputChanged(RuntimeError):
    """An input file is not the one that was planned: its size or its Parquet footer differs."""


class InputUnreadable(RuntimeError):
    """Rows of an input file cannot be read, though it is the one that was planned."""


@dataclass(frozen=True)
class InputSet:
    """The shards of a request in order, under their deepest common folder, and the schema that they share."""

    root: Path
    shards: tuple[Shard, ...]
    schema: pa.Schema


def scan_shards(paths: Sequence[str]) -> InputSet:
    """Find the Parquet files that `paths` (files, folders, globs) name and read their footers.

    Folders are searched for `*.parquet`, names that begin with `.` or `_` skipped. Raises ConfigError when a path names
    nothing, a file is not readable Parquet, a column name occurs twice, or two files' columns differ.
    """
    files = sorted({os.path.abspath(file) for path in paths for file in _expand(path)})
    if not files:
        raise ConfigError("input.paths is empty; give at least one Parquet file, folder or glob")
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        scanned = list(pool.map(_scan_file, files))
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    found = list(zip(files, scanned, strict=True))
    shards = tuple(Shard(Path(file).relative_to(root).as_posix(), f.size, f.num_rows, f.digest) for file, f in found)
    return InputSet(Path(root), shards, _common_schema([(file, facts.schema) for file, facts in found]))


def _expand(path: str) -> list[str]:
    """The files that one entry of `input.paths` names. What exists under the literal name is never taken for a glob."""
    path = os.path.expanduser(path)
    matches = [path] if os.path.lexists(path) else _glob(path)
    files = [file for match in matches for file in (_walk(match) if os.path.isdir(match) else [match])]
    if not files:
        what = "a folder without *.parquet files" if os.path.isdir(path) else "no file, folder or glob that matches anything"
        raise ConfigError(f"input.paths: {path!r} is {what}; give Parquet files, folders that hold some, or globs")
    return files


def _glob(pattern: str) -> list[str]:
    """Matches of a glob, without the `_SUCCESS` and `_metadata` files that other programs leave beside shards."""
    private = os.path.basename(pattern).startswith("_")
    return [match for match in glob.glob(pattern, recursive=True) if private or not os.path.basename(match).startswith("_")]


def _walk(folder: str, above: tuple[str, ...] = ()) -> list[str]:
    """Every `*.parquet` below a folder. Linked folders are followed, except back into one of the folders `above`."""
    real = os.path.realpath(folder)
    if real in above:
        return []
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith((".", "_"))]
    except OSError as error:
        raise ConfigError(f"input.paths: the folder {folder!r} cannot be listed: {error.strerror}") from error
    files = [entry.path for entry in entries if not entry.is_dir() and entry.name.endswith(".parquet")]
    return files + [file for entry in entries if entry.is_dir() for file in _walk(entry.path, (*above, real))]


@dataclass(frozen=True)
class _FileFacts:
    size: int
    num_rows: int
    digest: str
    schema: pa.Schema


class _NotParquet(ValueError):
    """What is wrong with a file, to be said behind its name."""


def _read_footer_bytes(path: str | Path) -> tuple[int, bytes]:
    """(file size, footer with its length and the closing magic) in one or two reads."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < 12:
            raise _NotParquet(f"has {size} bytes")
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        if tail[-4:] != _MAGIC:
            raise _NotParquet("does not end as a Parquet file does: truncated, or another format")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > size - 4:
            raise _NotParquet("has a footer longer than the file: truncated or damaged")
        if length > len(tail):
            file.seek(size - length)
            tail = file.read(length)
        return size, tail[-length:]


def _digest(footer: bytes) -> str:
    return hashlib.blake2b(footer, digest_size=16).hexdigest()


def _scan_file(path: str) -> _FileFacts:
    try:
        path.encode()
        size, footer = _read_footer_bytes(path)
        # The footer alone, with the magic in front, is a whole Parquet file as far as metadata goes: no second visit to the disk.
        file = pq.ParquetFile(pa.BufferReader(_MAGIC + footer))
        _check_extent(file.metadata, size - len(footer))
        schema = file.schema_arrow
    except UnicodeEncodeError:
        raise ConfigError(f"input.paths: {os.fsencode(path)!r} has a name that is not UTF-8; rename the file") from None
    except (_NotParquet, OSError, pa.ArrowException) as error:
        raise ConfigError(f"input.paths: {path!r} cannot be read as Parquet: it {_reason(error)}") from error
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise ConfigError(f"input.paths: {path!r} has more than one column named {name!r}; column names must be unique")
    return _FileFacts(size, file.metadata.num_rows, _digest(footer), schema)


def _check_extent(metadata: pq.FileMetaData, end: int) -> None:
    """The last row group must end before the footer begins: else bytes are missing in the middle."""
    if not metadata.num_row_groups:
        return
    group = metadata.row_group(metadata.num_row_groups - 1)
    for i in range(group.num_columns):
        column = group.column(i)
        start = column.dictionary_page_offset or column.data_page_offset  # None or 0: no dictionary page
        if min(start, column.data_page_offset) + column.total_compressed_size > end:
            raise _NotParquet("lacks bytes that its footer promises: truncated or damaged")


def _reason(error: Exception) -> str:
    if isinstance(error, _NotParquet):
        return str(error)
    return f"gives the error: {error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()}"


def _common_schema(named: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """The first file's schema, with a column nullable where it is so in any file. Order and metadata may differ."""
    first_file, first = named[0]
    nullable = {field.name: field.nullable for field in first}
    for file, schema in named[1:]:
        if schema is first or schema.equals(first):
            continue
        _require_same_columns(first_file, first, file, schema)
        for field in schema:
            nullable[field.name] |= field.nullable
    return pa.schema([field.with_nullable(nullable[field.name]) for field in first], first.metadata)


def _require_same_columns(first_file: str, first: pa.Schema, file: str, schema: pa.Schema) -> None:
    for name in [*first.names, *(name for name in schema.names if name not in first.names)]:
        types = [s.field(name).type if name in s.names else None for s in (first, schema)]
        if types[0] != types[1]:
            here, there = ("does not exist" if t is None else f"is {t}" for t in types)
            raise ConfigError(
                f"input.paths: column {name!r} {here} in {first_file!r}, but {there} in {file!r}; all files of a run must"
                " have the same columns"
            )


class _Cursor:
    """An open shard and a position in it: reads forward without decoding any row twice."""

    def __init__(self, path: Path, shard: Shard, columns: Sequence[str]) -> None:
        self.signature = _signature(path)
        require_unchanged(path, shard)
        self.columns = list(columns)
        # Without it, damaged bytes that still decode would be read as other prompts. Only some writers leave checksums.
        self.file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
        counts = (self.file.metadata.row_group(i).num_rows for i in range(self.file.metadata.num_row_groups))
        self.group_starts = list(itertools.accumulate(counts, initial=0))
        self.position = 0
        self.pending: pa.RecordBatch | None = None  # what is left of the last batch decoded
        self.batches: Iterator[pa.RecordBatch] | None = None

    def read(self, start: int, stop: int) -> list[pa.RecordBatch]:
        """Rows start to stop, as slices of the batches they were decoded in, columns in the order asked for."""
        batches = self._seek(start)
        pieces = []
        while self.position < stop:
            batch = self.pending if self.pending is not None else next(batches)
            skip = min(max(0, start - self.position), batch.num_rows)
            take = min(stop - self.position, batch.num_rows)
            if take > skip:
                pieces.append(batch.slice(skip, take - skip).select(self.columns))
            self.pending = batch.slice(take) if take < batch.num_rows else None
            self.position += take
        return pieces

    def _seek(self, row: int) -> Iterator[pa.RecordBatch]:
        """Go on from where the cursor stands if `row` lies ahead in the same row group; else begin at the row's group."""
        group = bisect.bisect_right(self.group_starts, row) - 1
        if self.batches is None or not self.group_starts[group] <= self.position <= row:
            self.position = self.group_starts[group]
            self.pending = None
            self.batches = self._decode(group)
        return self.batches

    def _decode(self, group: int) -> Iterator[pa.RecordBatch]:
        """Batches from the beginning of a row group to the end of the file, decoded as they are asked for."""
        for i in range(group, self.file.metadata.num_row_groups):
            yield from self.file.iter_batches(_BATCH_ROWS, row_groups=[i], columns=self.columns, use_threads=False)


def _signature(path: Path) -> tuple[int, ...] | None:
    """What tells cheaply that a file may be another one than before; None when there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def require_unchanged(path: Path, shard: Shard) -> None:
    """Raises InputChanged when the file at `path` is not the planned shard, by its size and footer."""
    try:
        size, footer = _read_footer_bytes(path)
    except (OSError, _NotParquet) as error:
        raise InputChanged(f"{str(path)!r} cannot be read as it was when the run was planned: it {_reason(error)}") from error
    if size != shard.size or _digest(footer) != shard.footer:
        raise InputChanged(
            f"{str(path)!r} has changed since the run was planned ({shard.size:,} bytes then, {size:,} now); a run needs the"
            " very files it was planned with"
        )


def read_schema(root: Path, shard: Shard) -> pa.Schema:
    """The columns of one shard of a frozen plan. Raises InputChanged when the file is not the planned one."""
    path = Path(root) / shard.path
    require_unchanged(path, shard)
    return pq.read_schema(path)


class UnitReader:
    """Reads units of a frozen plan. Consecutive units of one row group continue one decode, however large the group is.

    Memory: the unit's rows, and for each of a few open files a batch of rows and a buffer per column.
    """

    def __init__(self, root: Path, shards: Sequence[Shard], columns: Sequence[str]) -> None:
        self._root, self._shards, self._columns = Path(root), shards, list(columns)
        self._cursors: OrderedDict[int, _Cursor] = OrderedDict()

    def read(self, unit: Unit) -> pa.Table:
        """Exactly the unit's rows in order, with the columns asked for in that order.

        Raises InputChanged when a file is not the planned one, RuntimeError naming file and rows when its pages are damaged.
        """
        batches = [batch for row_range in unit for batch in self._read_range(row_range)]
        # Files may differ in nullability and metadata of a column: only names and types are taken from them.
        schema = pa.schema([pa.field(field.name, field.type) for field in batches[0].schema])
        return pa.Table.from_batches([pa.RecordBatch.from_arrays(b.columns, schema=schema) for b in batches], schema)

    def _read_range(self, row_range: RowRange) -> list[pa.RecordBatch]:
        path = self._root / self._shards[row_range.shard].path
        cursor = self._cursor(row_range.shard, path)
        try:
            return cursor.read(row_range.start, row_range.stop)
        except (OSError, pa.ArrowException, StopIteration) as error:
            del self._cursors[row_range.shard]
            rows = f"rows {row_range.start:,} to {row_range.stop - 1:,}"
            raise InputUnreadable(f"{str(path)!r}: {rows} cannot be read: {error or 'the file ends before them'}") from error

    def _cursor(self, index: int, path: Path) -> _Cursor:
        """The open cursor of a shard; the least recently used one is let go.

        A file is compared with the plan when it is opened, and again when its inode, size or time have changed since.
        """
        if index in self._cursors and self._cursors[index].signature != _signature(path):
            del self._cursors[index]
        if index not in self._cursors:
            self._cursors[index] = _Cursor(path, self._shards[index], self._columns)
        self._cursors.move_to_end(index)
        while len(self._cursors) > _OPEN_FILES:
            self._cursors.popitem(last=False)[1].file.close()
        return self._cursors[index]
