"""A small run made by hand: two shards in four units, committed as a replica does it, or with something wrong in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.config import Config, from_dict
from batchinfer.data.columns import columns_to_read
from batchinfer.data.reader import UnitReader, scan_shards
from batchinfer.data.results import RowResult
from batchinfer.data.schema import RowRange, UnitFooter
from batchinfer.data.writer import commit_unit, logical_hash, output_schema, unit_footer, unit_table
from batchinfer.job.manifest import Manifest, request_of
from batchinfer.job.rundir import RunDir

# Rows 0-7 of a.parquet and 0-3 of b.parquet; unit 1 spans both.
UNITS = ((RowRange(0, 0, 5),), (RowRange(0, 5, 8), RowRange(1, 0, 2)), (RowRange(1, 2, 4),), (RowRange(1, 4, 5),))
Keys = list[tuple[str, int]]


def write_inputs(folder: Path, word: str = "prompt") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("a", 8), ("b", 5)):
        table = pa.table(
            {
                "id": pa.array(range(rows), pa.int16()),
                "prompt": [f"{word} {name} {i}" for i in range(rows)],
                "how": [f'{{"n": {1 + i % 3}}}' for i in range(rows)],
            }
        )
        pq.write_table(table, folder / f"{name}.parquet")


def config_of(data: Path, sampling: dict[str, Any], sampling_column: str | None = None) -> Config:
    source = {"prompt_column": "prompt", "paths": [str(data)], "sampling_column": sampling_column}
    output = {"prefix": "our_", "keep_columns": ["id"], "token_ids": True}
    return from_dict({"model": {"path": "/nowhere"}, "input": source, "sampling": sampling, "output": output})


def commit(
    run_dir: RunDir,
    unit: int,
    generation: int = 0,
    keys: Callable[[Keys], Keys] = list,
    change: Callable[[pa.Table], pa.Table] = lambda table: table,
    said: dict[str, Any] | None = None,
    rehash: bool = False,
) -> None:
    """Commits a unit as a replica does, or with something wrong in it."""
    manifest = Manifest.load(run_dir)
    root, config = Path(manifest.input_root), manifest.config
    columns = columns_to_read(config.input, pq.read_schema(root / "a.parquet"), ["id"])
    inputs = UnitReader(root, manifest.shards, columns).read(manifest.units[unit])
    all_keys = keys([(manifest.shards[r.shard].path, row) for r in manifest.units[unit] for row in range(r.start, r.stop)])
    asked = [config.sampling.n] * len(all_keys)
    if config.input.sampling_column is not None:
        asked = [json.loads(text)["n"] for text in inputs["how"].to_pylist()]
    results = [[RowResult(3, "text", [1, 2], "stop", sample=k) for k in range(count)] for count in asked]
    results[0] = [RowResult(0, error="null_prompt", error_message="the prompt is null")]
    kept = inputs.select(["id"]).take([i % len(inputs) for i in range(len(all_keys))])
    schema = output_schema(pq.read_schema(root / "a.parquet"), ["id"], config)
    table = unit_table(kept, all_keys, results, config, "r0", schema)
    footer: UnitFooter = unit_footer(unit, generation, inputs, table, "our_", "r0", {}, manifest.fingerprint)
    footer = dataclasses.replace(
        footer, rows=len(inputs), content_hash=logical_hash(change(table)) if rehash else footer.content_hash
    )
    commit_unit(run_dir, unit, generation, change(table), dataclasses.replace(footer, **said or {}), "zstd")


def create(folder: Path, sampling: dict[str, Any], sampling_column: str | None = None) -> RunDir:
    run_dir, data = RunDir(folder / "run"), folder / "data"
    write_inputs(data)
    inputs, config = scan_shards([str(data)]), config_of(data, sampling, sampling_column)
    Manifest.create(run_dir, config, inputs, ["id"], UNITS, request_of(config, inputs.shards, inputs.schema))
    return run_dir


def commit_all(run_dir: RunDir) -> RunDir:
    for unit in range(len(UNITS)):
        commit(run_dir, unit)
    return run_dir
