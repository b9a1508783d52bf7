"""A small run of a random model over rows of token ids, for replicas that work in this process."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.config import from_dict
from batchinfer.data.reader import scan_shards
from batchinfer.data.schema import RowRange
from batchinfer.job.manifest import Manifest, request_of
from batchinfer.job.rundir import RunDir

ROWS, UNIT, TOKENS = 16, 4, 40
ARCHITECTURE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "model_type": "llama",
}


def make_run(folder: Path, n: int = 1) -> tuple[RunDir, Manifest]:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"ids": [[k + 1, 7, k % 5] for k in range(ROWS)]}), folder / "in.parquet")
    config = from_dict(
        {
            "hw": {"gpu": None},
            "model": {"load_format": "random", "dtype": "float64", "architecture": ARCHITECTURE},
            "input": {"paths": [str(folder / "in.parquet")], "token_ids_column": "ids"},
            "sampling": {"temperature": 0.9, "max_tokens": TOKENS, "ignore_eos": True, "n": n},
            "output": {"token_ids": True},
            "engine": {"max_num_seqs": 4},
        }
    )
    found = scan_shards(config.input.paths)
    units = tuple((RowRange(0, start, start + UNIT),) for start in range(0, ROWS, UNIT))
    run_dir = RunDir(folder / "run")
    return run_dir, Manifest.create(run_dir, config, found, ["ids"], units, request_of(config, found.shards, found.schema))
