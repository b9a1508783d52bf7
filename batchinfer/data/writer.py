"""Writing output: which columns a completions file has, how a unit's results become one, and the hash over its rows.

The logical hash is what makes a committed file checkable: it is taken over values, not over bytes on disk, so it is the same
before writing and after reading, whatever the chunks, slices, dictionaries and compression in between. The file hash beside it is
over bytes: it finds what is damaged without being a value, and what is whole without decoding it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.config import Config, ConfigError
from batchinfer.data.results import RowResult, logprobs_column
from batchinfer.data.schema import (
    BLOCK_ROWS,
    FOOTER_KEY,
    LOGPROBS,
    OPTIONAL,
    OUTPUT_FIELDS,
    SCHEMA_VERSION,
    ZEROS,
    UnitFooter,
)
from batchinfer.job.rundir import RunDir
from batchinfer.publish import Published, publish, temporary

HASH_MARK = b'"file_hash": "'
HASH_BYTES = 8 << 20  # read at once
SHORT_HASH = 16  # hex digits that say where, once the whole hash has said that something differs


class DamagedFile(ConfigError):
    """A file that is only ever published whole, and is not."""


def our_fields(config: Config) -> list[pa.Field]:
    """The columns that we add, under the names that `output.prefix` gives them."""
    sampling = config.sampling
    asked = (config.output.token_ids, sampling.logprobs is not None, sampling.prompt_logprobs is not None)
    left_out = {name for name, is_asked in zip(OPTIONAL, asked, strict=True) if not is_asked}
    return [field.with_name(config.output.prefix + field.name) for field in OUTPUT_FIELDS if field.name not in left_out]


def output_schema(input_schema: pa.Schema, kept: Sequence[str], config: Config) -> pa.Schema:
    """The kept input fields as they are (type, nullability, metadata), then ours."""
    return pa.schema([*(input_schema.field(name) for name in kept), *our_fields(config)])


def unit_table(
    inputs: pa.Table,
    keys: Sequence[tuple[str, int]],
    results: Sequence[Sequence[RowResult]],
    config: Config,
    replica: str,
    schema: pa.Schema,
) -> pa.Table:
    """One output row for each sample of each input row, in order.

    `keys` are the (shard path, row) of the input rows, `results` the samples of each; `schema` is `output_schema`'s.
    """
    ours = our_fields(config)
    kept = schema.names[: len(schema) - len(ours)]
    samples = [result for row in results for result in row]
    names = [key for key, row in zip(keys, results, strict=True) for _ in row]
    columns: dict[str, list[Any]] = {
        "shard": [shard for shard, _ in names],
        "row": [row for _, row in names],
        "replica": [result.replica or replica for result in samples],
        "num_completion_tokens": [len(result.token_ids) for result in samples],
        "token_ids": [None if result.error else result.token_ids for result in samples],
        "logprobs": [None if result.error else result.logprobs for result in samples],
        "prompt_logprobs": [None if result.error else row[0].prompt_logprobs for row in results for result in row],
    }
    arrays: list[Any] = repeat_rows(inputs.select(kept), [len(row) for row in results]).columns
    for field in ours:
        name = field.name.removeprefix(config.output.prefix)
        values = columns[name] if name in columns else [getattr(result, name) for result in samples]
        arrays.append(logprobs_column(values) if field.type == LOGPROBS else pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def repeat_rows(table: pa.Table, counts: Sequence[int], max_bytes: int = 2**30) -> pa.Table:
    """Each row of the table `counts[row]` times. Chunks grow to at most about `max_bytes`, as Arrow's 32-bit offsets ask for."""
    if all(count == 1 for count in counts):
        return table
    batches, start = [], 0
    for batch in table.to_batches():
        batches += _repeat(batch, np.asarray(counts[start : start + batch.num_rows], np.int64), max_bytes)
        start += batch.num_rows
    return pa.Table.from_batches(batches, table.schema)


def _repeat(batch: pa.RecordBatch, counts: np.ndarray[Any, Any], max_bytes: int) -> list[pa.RecordBatch]:
    if batch.nbytes * counts.max(initial=0) > max_bytes:
        if batch.num_rows == 1:
            return [batch] * int(counts[0])
        half = batch.num_rows // 2
        return _repeat(batch.slice(0, half), counts[:half], max_bytes) + _repeat(batch.slice(half), counts[half:], max_bytes)
    indices = np.repeat(np.arange(batch.num_rows), counts)
    return [pa.RecordBatch.from_arrays([_take(column, indices) for column in batch.columns], schema=batch.schema)]


def _take(column: pa.Array, indices: np.ndarray[Any, Any]) -> pa.Array:
    try:
        return column.take(pa.array(indices))
    except pa.ArrowNotImplementedError:  # views of text and binary
        return pa.concat_arrays([column.slice(i, 1) for i in indices] or [column.slice(0, 0)])


def unit_footer(
    unit: int,
    generation: int,
    inputs: pa.Table,
    table: pa.Table,
    prefix: str,
    replica: str,
    versions: dict[str, Any],
    fingerprint: str = "",
) -> UnitFooter:
    """What the completions file will say of itself. `inputs` is the table that the unit's reader gave, `table` the output, with
    `prefix` before the names of our columns."""
    content, columns = logical_hashes(table)
    return UnitFooter(
        schema_version=SCHEMA_VERSION,
        unit=unit,
        generation=generation,
        rows=inputs.num_rows,
        samples=table.num_rows,
        prompt_tokens=pc.sum(table[prefix + "num_prompt_tokens"]).as_py() or 0,
        completion_tokens=pc.sum(table[prefix + "num_completion_tokens"]).as_py() or 0,
        errors=dict(sorted(Counter(table[prefix + "error"].drop_null().to_pylist()).items())),
        content_hash=content,
        input_hash=logical_hash(inputs),
        replica=replica,
        versions=versions,
        fingerprint=fingerprint,
        column_hashes=columns,
        block_hashes=block_hashes(table),
    )


def commit_unit(run_dir: RunDir, unit: int, generation: int, table: pa.Table, footer: UnitFooter, compression: str) -> Published:
    """Write the unit under a temporary name and publish it. LOST: somebody else committed this generation first."""
    final = run_dir.completion(unit, generation)
    tmp = temporary(final)
    try:
        with open(tmp, "xb") as file:  # a file, not its name: pyarrow would take some names for URIs
            _write(file, table, footer, "NONE" if compression == "none" else compression)
        _seal(tmp)
        return publish(tmp, final)
    finally:
        tmp.unlink(missing_ok=True)


def _write(file: IO[bytes], table: pa.Table, footer: UnitFooter, codec: str) -> None:
    # List items keep the names that they have in the input, so that a type is read back as it was, to the letter.
    with pq.ParquetWriter(file, table.schema, compression=codec, use_compliant_nested_type=False) as writer:
        for group in row_groups(table):
            writer.write_table(group)
        unsealed = dataclasses.replace(footer, file_hash=ZEROS)
        writer.add_key_value_metadata({FOOTER_KEY: json.dumps(dataclasses.asdict(unsealed))})


def _seal(path: Path) -> None:
    """Give the footer the hash over the file in which it stands. It is as long as the zeros, so that nothing moves."""
    digest = file_hash(path).encode()
    with open(path, "r+b") as file:
        file.seek(_place_of_hash(file))
        file.write(digest)


def file_hash(path: Path) -> str:
    """Hex digest over the bytes of a completions file, with zeros where its footer has this very hash. ValueError: none there."""
    digest = hashlib.blake2b(digest_size=len(ZEROS) // 2)
    with open(path, "rb") as file:
        place = _place_of_hash(file)
        file.seek(0)
        left = place
        while left and (chunk := file.read(min(left, HASH_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(ZEROS.encode())
        file.seek(place + len(ZEROS))
        digest.update(file.read())
    return digest.hexdigest()


def _place_of_hash(file: IO[bytes]) -> int:
    """Where in the file the footer's hash begins. Our text comes after all statistics, which may quote rows: so, the last one."""
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    start = file.seek(-8 - length, os.SEEK_END)
    found = file.read(length).rfind(HASH_MARK)
    if found < 0:
        raise ValueError("its footer has no hash of the file")
    return start + found + len(HASH_MARK)


def row_groups(table: pa.Table) -> list[pa.Table]:
    """The table as one row group, unless its dictionaries have more values together than their index type can number.

    That happens with categories of a byte when shards or row groups have their own. Such a group could be written, but not read.
    """
    try:
        table.unify_dictionaries()
        return [table]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # too many, or dictionaries inside other types
        return [pa.Table.from_batches([batch]) for batch in table.to_batches()]


def read_footer(path: Path) -> UnitFooter:
    """The footer of a completions file; no row is read. Raises ValueError when it is not a whole completions file."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        return UnitFooter(**json.loads(metadata[FOOTER_KEY]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DamagedFile(
            f"{path}: not a whole completions file ({error}), so something else has damaged it; "
            "remove it and `resume` makes its rows again"
        ) from error


def read_rows(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a completions file. By row groups, because pyarrow joins no nested dictionaries of several."""
    return pa.concat_tables(file.read_row_group(group, columns) for group in range(file.metadata.num_row_groups))


def logical_hash(table: pa.Table) -> str:
    """Hex digest over the table's column names, types and values in order.

    It does not depend on chunks, slices, dictionary encoding, what lies in memory under a null, or anything a Parquet round
    trip may change beside values and types. NaNs with different bits count as different, and so do 0.0 and -0.0.
    """
    return logical_hashes(table)[0]


def logical_hashes(table: pa.Table) -> tuple[str, dict[str, str]]:
    """The logical hash of a table, and those of its columns by themselves, shortened."""
    whole, columns = hashlib.blake2b(digest_size=32), {}
    for name, column in zip(table.schema.names, table.columns, strict=True):
        alone, texts = hashlib.blake2b(digest_size=32), _column_texts(name, column)
        for digest in (whole, alone):
            _feed(digest, texts)
        columns[name] = alone.hexdigest()[:SHORT_HASH]
    return whole.hexdigest(), columns


def block_hashes(table: pa.Table) -> list[str]:
    """The logical hash of each `BLOCK_ROWS` rows, shortened."""
    return [logical_hash(table.slice(start, BLOCK_ROWS))[:SHORT_HASH] for start in range(0, table.num_rows, BLOCK_ROWS)]


def _column_texts(name: str, column: pa.ChunkedArray) -> list[str]:
    streams = _Streams(lambda: hashlib.blake2b(digest_size=32))
    for chunk in column.chunks:
        _update(streams, "", chunk)
    hashes = [part for path, stream in sorted(streams.items()) for part in (path, stream.hexdigest())]
    return [name, _type_name(column.type), str(len(column)), *hashes]


# One running hash for each buffer of a nested column, by its path: chunks append to them, so their borders leave no trace.
_Streams = defaultdict[str, Any]


def _feed(digest: Any, texts: Iterable[str]) -> None:
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)


def _append(streams: _Streams, path: str, values: np.ndarray[Any, Any]) -> None:
    if values.size:  # an empty chunk leaves no trace either
        streams[path].update(np.ascontiguousarray(values).data)


def _type_name(kind: pa.DataType) -> str:
    """A type's name without dictionary encoding, nullability of children, and the names of list items."""
    if isinstance(kind, pa.BaseExtensionType):
        return f"{kind.extension_name}<{_type_name(kind.storage_type)}>"
    if pa.types.is_dictionary(kind):
        return _type_name(kind.value_type)
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{json.dumps(field.name)}: {_type_name(field.type)}' for field in kind)}>"
    if pa.types.is_map(kind):
        return f"map<{_type_name(kind.key_type)}, {_type_name(kind.item_type)}>"
    if _is_list(kind):
        size = f", {kind.list_size}" if pa.types.is_fixed_size_list(kind) else ""
        return f"{str(kind).split('<')[0]}<{_type_name(kind.value_type)}{size}>"
    return str(kind)


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)


def _update(streams: _Streams, path: str, array: pa.Array) -> None:
    """Append an array's logical content to the streams under `path`."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _update(streams, path, array.storage)
    if pa.types.is_dictionary(kind):
        return _update(streams, path, array.dictionary_decode())
    _append(streams, path + "/valid", array.is_valid().cast(pa.uint8()).to_numpy(zero_copy_only=False))
    if pa.types.is_struct(kind):
        for i, child in enumerate(array.flatten()):  # a child is null where its parent is
            _update(streams, f"{path}/{i}", child)
    elif pa.types.is_map(kind) or _is_list(kind):
        _update_list(streams, path, array)
    elif not pa.types.is_null(kind):
        _update_leaf(streams, path, array)
    return None


def _update_list(streams: _Streams, path: str, array: pa.Array) -> None:
    if pa.types.is_map(array.type):
        array = array.cast(pa.list_(pa.struct([("key", array.type.key_type), ("value", array.type.item_type)])))
    lengths = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64())
    _append(streams, path + "/length", lengths.to_numpy())
    _update(streams, path + "/item", array.flatten())  # what lies under null lists is left out


def _update_leaf(streams: _Streams, path: str, array: pa.Array) -> None:
    """Lengths and bytes of text and binary values, the bytes of all others; null values take no part."""
    kind = array.type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        array = array.cast(pa.large_binary())
    elif pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    valid = array.drop_null() if array.null_count else array
    width = _byte_width(array.type)
    start, stop, buffers = valid.offset, valid.offset + len(valid), valid.buffers()
    if width is None:
        large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
        offsets = np.frombuffer(buffers[1] or b"", np.int64 if large else np.int32)[start : stop + 1].astype(np.int64)
        _append(streams, path + "/length", np.diff(offsets))
        start, stop, width = (int(offsets[0]), int(offsets[-1]), 1) if len(offsets) else (0, 0, 1)
    data = np.frombuffer(buffers[-1] or b"", np.uint8)
    _append(streams, path + "/data", data[start * width : stop * width])


def _byte_width(kind: pa.DataType) -> int | None:
    """Bytes of a value of a fixed width; None for those with offsets."""
    variable = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return None if any(test(kind) for test in variable) else kind.bit_width // 8
