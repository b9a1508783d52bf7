"""What a stopped replica has of the rows of a unit that it gives back: `partials/<unit>.<epoch>.parquet`.

Only a saving: whoever takes the unit next goes on where these rows stood, and finished ones are not made again. A file is
published whole by the holder of the claim with this epoch, before it releases the claim; a reader takes the newest one of an
epoch below its own. One that is damaged, or of another request, is left aside with a warning, and its rows start over. Error
rows are not saved: they are made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.results import RowResult, logprobs_column, logprobs_rows
from batchinfer.data.schema import FOOTER_KEY, LOGPROBS
from batchinfer.data.writer import logical_hash
from batchinfer.job.rundir import RunDir
from batchinfer.publish import replace_bytes

log = logging.getLogger(__name__)

Key = tuple[str, int, int]  # shard, row, sample
VALUES = (
    pa.field("num_prompt_tokens", pa.int32(), nullable=False),
    pa.field("prompt_hash", pa.int64(), nullable=False),
    pa.field("completion", pa.string()),  # null: it goes on, or is still to be decoded
    pa.field("token_ids", pa.list_(pa.field("element", pa.int32())), nullable=False),
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("ttft_s", pa.float64(), nullable=False),
    pa.field("latency_s", pa.float64(), nullable=False),
    pa.field("step_first", pa.int64()),
    pa.field("step_last", pa.int64()),  # null: it goes on
    pa.field("replica", pa.string()),
    pa.field("logprobs", LOGPROBS),
    pa.field("prompt_logprobs", LOGPROBS),
)  # as in `RowResult`
KEYS = (
    pa.field("shard", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
)
SCHEMA = pa.schema([*KEYS, *VALUES])


def prompt_hash(token_ids: Sequence[int]) -> int:
    """64 bits, signed, over a prompt: another prompt is never gone on with, whatever changed it."""
    packed = array("i", token_ids).tobytes()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


def save_partial(run_dir: RunDir, unit: int, epoch: int, fingerprint: str, results: Mapping[Key, RowResult]) -> None:
    """Publish what there is of a unit that is not finished, in place of what the same claim had saved before. Raises OSError."""
    table = _table(results)
    footer = {"unit": unit, "fingerprint": fingerprint, "content_hash": logical_hash(table)}
    table = table.replace_schema_metadata({FOOTER_KEY: json.dumps(footer)})
    file = pa.BufferOutputStream()
    pq.write_table(table, file, compression="zstd")
    replace_bytes(run_dir.partial(unit, epoch), file.getvalue().to_pybytes(), durable=True)


def load_partial(run_dir: RunDir, unit: int, epoch: int, fingerprint: str) -> dict[Key, RowResult]:
    """What the holders of a unit before the claim with this epoch left of it; empty when there is nothing of use."""
    for before in run_dir.partial_epochs(unit):
        if before < epoch:
            path = run_dir.partial(unit, before)
            try:
                return _read(path, unit, fingerprint)
            except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
                log.warning("%s is left aside, what it saved is made again: %s", path, " ".join(str(error).split()))
    return {}


def _table(results: Mapping[Key, RowResult]) -> pa.Table:
    shards, rows, samples = zip(*results, strict=True)
    arrays = [pa.array(values, field.type) for values, field in zip((shards, rows, samples), KEYS, strict=True)]
    for field in VALUES:
        values = [getattr(result, field.name) for result in results.values()]
        arrays.append(logprobs_column(values) if field.type == LOGPROBS else pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _read(path: Path, unit: int, fingerprint: str) -> dict[Key, RowResult]:
    """Raises ValueError, KeyError, TypeError, OSError or an ArrowException for a file that must not be used."""
    with pq.ParquetFile(path) as file:
        table = file.read()
    footer = json.loads(table.schema.metadata[FOOTER_KEY])
    table = table.replace_schema_metadata(None)
    if (footer["unit"], footer["fingerprint"]) != (unit, fingerprint):
        raise ValueError("it is of another request")
    if table.schema != SCHEMA or logical_hash(table) != footer["content_hash"]:
        raise ValueError("its rows are not those that were written")
    keys = zip(*(table[field.name].to_pylist() for field in KEYS), strict=True)
    return {key: RowResult(sample=key[2], **values) for key, values in zip(keys, _values(table), strict=True)}


def _values(table: pa.Table) -> list[dict[str, Any]]:
    columns = {
        field.name: logprobs_rows(table[field.name]) if field.type == LOGPROBS else table[field.name].to_pylist()
        for field in VALUES
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
