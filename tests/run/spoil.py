"""Makes committed rows into errors, as a replica would have committed them on which the model's numbers overflowed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.data.columns import columns_to_read
from batchinfer.data.reader import UnitReader
from batchinfer.data.writer import commit_unit, unit_footer
from batchinfer.job.manifest import Manifest
from batchinfer.job.rundir import RunDir
from batchinfer.publish import Published

Key = tuple[str, int, int]  # shard, row, sample
EMPTY = ("completion", "token_ids", "logprobs", "prompt_logprobs", "ttft_s", "latency_s", "step_first", "step_last")


def spoil(root: Path, samples: Collection[Key] = (), rows: Collection[tuple[str, int]] = (), code: str = "bad_logits") -> None:
    """`samples` become errors; so do `rows` as a whole, as if they had never become a prompt."""
    run_dir = RunDir(root)
    hit = {*(key[:2] for key in samples), *rows}
    for unit, generation in run_dir.done_units().items():
        path = run_dir.completion(unit, generation)
        with pq.ParquetFile(path) as file:
            table = file.read()
        if hit.isdisjoint(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)):
            continue
        changed = [_changed(row, samples, rows, code) for row in table.to_pylist()]
        table = pa.Table.from_pylist([row for row in changed if row], schema=table.schema)
        _rewrite(run_dir, unit, generation, table)


def _changed(
    row: dict[str, Any], samples: Collection[Key], rows: Collection[tuple[str, int]], code: str
) -> dict[str, Any] | None:
    whole = (row["shard"], row["row"]) in rows
    if whole and row["sample"] > 0:
        return None
    if not whole and (row["shard"], row["row"], row["sample"]) not in samples:
        return row
    row |= {name: None for name in EMPTY if name in row}
    row |= {"finish_reason": "error", "error": code, "error_message": "it overflowed", "num_completion_tokens": 0}
    return row | ({"num_prompt_tokens": 0} if whole else {})


def _rewrite(run_dir: RunDir, unit: int, generation: int, table: pa.Table) -> None:
    manifest = Manifest.load(run_dir)
    root = Path(manifest.input_root)
    columns = columns_to_read(manifest.config.input, pq.read_schema(root / manifest.shards[0].path), manifest.columns)
    inputs = UnitReader(root, manifest.shards, columns).read(manifest.units[unit])
    footer = unit_footer(unit, generation, inputs, table, "", "01-0-0", {}, manifest.fingerprint)
    run_dir.completion(unit, generation).unlink()
    assert commit_unit(run_dir, unit, generation, table, footer, "zstd") is Published.WON
